"""Runs the experiments on whole models behind docs/evidence.md, one after the other.

Each is a call of ``benchmarks.quality.compare`` with its own result file. What is already measured
is not repeated, so the command can be stopped and given again::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.assets mixed
    python -m benchmarks.demo.assets news
    python -m benchmarks.quality.evidence smollm2 demo/models/smollm2-135m \
        --calibration demo/texts/mixed-calibration.txt --text speeches=packaged \
        --text wikipedia=demo/texts/wikipedia-evaluation.txt \
        --text news=demo/texts/news-evaluation.txt
    python -m benchmarks.quality.evidence opt-125m facebook/opt-125m --calibration allenai/c4:en \
        --text wikitext=Salesforce/wikitext:wikitext-2-raw-v1:test \
        --text c4=allenai/c4:en:validation --text ptb=ptb-test.txt

``--list`` prints the calls instead. The model and the texts are folders, files or names on the
hub (datasets as NAME:CONFIG:SPLIT); PTB has to be a file, since its copy on the hub is a program
that the library ``datasets`` no longer runs. The first argument names the results. ``2of4`` was
run without ``--calibration`` and on two texts only. Where the committed results have fewer seeds
than are listed here, the tables show it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click

from benchmarks.harness.evaluation_texts import HELP
from benchmarks.quality.compare import default_variant

DEFAULT = default_variant()

# The weight of intra+inter: how much of earlier layers' errors is repaired.
WEIGHTS = ("0", "0.25", "0.5", "0.75", "1")


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question: which variants, on which pattern, with which seeds and how many windows."""

    name: str
    variants: tuple[str, ...]
    pattern: str = "2:4"
    seeds: str = "0"
    samples: int = 16


def experiments() -> Iterator[Experiment]:
    """Yield them, the most important first."""
    yield Experiment(
        "mixed",
        (
            DEFAULT,
            "admm:intra+inter",
            "admm:none",
            "sparsegpt:sequential",
            "fista-paper:intra",
            "fista-paper[warm_start=admm]:intra",
        ),
        seeds="0,1,2",
        samples=64,
    )
    yield Experiment("256", (DEFAULT,), samples=256)
    yield Experiment("50percent-mixed", ("sparsegpt:sequential", DEFAULT), "50%", samples=64)
    yield Experiment(
        "2of4",
        (
            "magnitude:none",
            "wanda:none",
            "sparsegpt:none",
            "fista:none",
            "fista:intra",
            DEFAULT,
        ),
        seeds="0,1,2",
    )
    yield Experiment(
        "steps",
        (
            *(f"sparsegpt:{kind}" for kind in ("none", "intra", "sequential")),
            *(f"admm:{kind}" for kind in ("none", "intra", "sequential")),
            *(f"admm:intra+inter@{weight}" for weight in WEIGHTS),
            "wanda:none",
            "wanda:none,reconstruct",
            "sparsegpt:sequential,reconstruct",
            "admm:intra+inter,reconstruct",
            DEFAULT,
        ),
    )
    for percent in (5, 10, 20, 50):
        corrections = ("none", "intra", "intra+inter@0.5", "intra+inter@1")
        variants = tuple(f"admm:{kind}" for kind in corrections)
        yield Experiment(f"corrections-{percent}percent", variants, f"{percent}%")
    for samples in (8, 32):  # 16 is among the steps, 64 and 256 are above
        variants = ("sparsegpt:sequential", DEFAULT)
        yield Experiment(f"samples-{samples}", variants, samples=samples)


def command(
    experiment: Experiment,
    name: str,
    model: str,
    texts: tuple[str, ...],
    calibration: str | None = None,
) -> list[str]:
    """Return the call of ``benchmarks.quality.compare``."""
    call = [sys.executable, "-m", "benchmarks.quality.compare", model]
    call += ["--result", f"quality-{name}-{experiment.name}.json"]
    call += ["--pattern", experiment.pattern, "--seeds", experiment.seeds]
    call += ["--samples", str(experiment.samples)]
    if calibration:
        call += ["--calibration", calibration]
    call += [part for text in texts for part in ("--text", text)]
    return call + [part for variant in experiment.variants for part in ("--only", variant)]


@click.command()
@click.argument("name")
@click.argument("model")
@click.option("--text", "texts", multiple=True, help=HELP)
@click.option("--calibration", help="Calibration text; default: the packaged one.")
@click.option("--only", multiple=True, help="Names of experiments; default: all.")
@click.option("--list", "only_list", is_flag=True, help="Print the calls, run nothing.")
def main(
    *,
    name: str,
    model: str,
    texts: tuple[str, ...],
    calibration: str | None,
    only: tuple[str, ...],
    only_list: bool,
) -> None:
    known = {experiment.name: experiment for experiment in experiments()}
    if unknown := set(only) - set(known):
        raise click.UsageError(f"no such experiment: {min(unknown)}; there are {', '.join(known)}")
    for experiment in known.values():
        if only and experiment.name not in only:
            continue
        call = command(experiment, name, model, texts, calibration)
        click.echo(shlex.join(call), err=not only_list)
        if not only_list:
            subprocess.run(call, check=True)


if __name__ == "__main__":
    main()
