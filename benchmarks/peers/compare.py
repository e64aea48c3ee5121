"""What do the maintained tools for 2:4 make of the same model and the same tokens?

llm-compressor and NVIDIA Model Optimizer are installed from the package index, each in an
environment of its own, and called through their public entry points with their defaults. They
calibrate on the token windows that ``benchmarks/quality/compare.py`` gives our methods; what they
write is checked to be 2:4 and evaluated the same way. Each run is written to the JSON as soon as
it is done; runs already there are not repeated::

    python -m benchmarks.peers.compare demo/models/smollm2-135m --result peers-smollm2-2of4.json

``--time-against-ours`` evaluates nothing and times pruning, the tool and ours in turns, all of ours
or, with ``--ours-only``, our SparseGPT and what is named::

    python -m benchmarks.peers.compare demo/models/smollm2-135m --result time-smollm2.json \
        --samples 32 --only llmcompressor:sparsegpt --time-against-ours --repeats 1 \
        --calibration demo/texts/mixed-calibration.txt
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.evaluation_texts import text_option
from benchmarks.harness.results import RESULTS, stored, write_result
from benchmarks.peers.environment import (
    PEERS,
    Peer,
    PeerError,
    WorkerReport,
    environment,
    run_peer,
    write_windows,
)
from benchmarks.peers.timing import ours_timed, time_in_turns, write_timings
from benchmarks.quality.compare import Setting, perplexities
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.cli.console import quiet_libraries
from sparseserve.sparsity import TWO_FOUR
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRun:
    """One tool, method and seed.

    ``changed_weights`` is the share of the kept weights whose value is not the dense one.
    """

    seed: int
    worker: WorkerReport
    perplexity: dict[str, float]
    zeros: float
    changed_weights: float

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeerRun:
        return cls(**{**data, "worker": WorkerReport(**data["worker"])})


@dataclass(frozen=True, slots=True)
class Difference:
    """How the pruned operators differ from the dense ones: shares of all and of kept weights."""

    zeros: float
    changed: float


def compare(pruned: Path, dense: Path, operators: Sequence[str]) -> Difference:
    """Check that every operator in ``pruned`` is 2:4, and compare it with the dense one.

    Raises:
        PeerError: Names the first operator that is not 2:4.
        ArtifactError: An operator is missing.
    """
    ours, theirs = Checkpoint.open(dense), Checkpoint.open(pruned)
    total = kept = changed = 0
    for name in operators:
        weight, old = theirs.tensor(f"{name}.weight"), ours.tensor(f"{name}.weight")
        if violation := TWO_FOUR.first_violation(weight):
            raise PeerError(f"{pruned}: {name} is not 2:4: {violation}")
        total += weight.numel()
        kept += int((weight != 0).sum())
        changed += int(((weight != 0) & (weight != old)).sum())
    return Difference(zeros=1 - kept / total, changed=changed / kept)


def measure(setting: Setting, peer: Peer, method: str, seed: int) -> PeerRun:
    """Prune with another tool, check and evaluate.

    Raises:
        PeerError: The tool failed, saw other tokens, or its result is not 2:4.
    """
    python = environment(peer)
    operators = [name for name, _ in plan(Job(setting.model)).operators]
    with tempfile.TemporaryDirectory() as scratch:
        windows, out = Path(scratch) / "windows.safetensors", Path(scratch) / "pruned"
        digest = write_windows(setting.model, setting.calibration_spec(seed), windows)
        report = run_peer(
            peer, method, python=python, model=setting.model, windows=windows, checkpoint=out
        )
        if report.digest != digest:
            raise PeerError(f"{peer.tool} read other tokens than were written")
        difference = compare(out, Path(setting.model), operators)
        return PeerRun(
            seed=seed,
            worker=report,
            perplexity=perplexities(setting, str(out)),
            zeros=difference.zeros,
            changed_weights=difference.changed,
        )


@click.command()
@click.argument("model")
@click.option("--result", required=True, help="File name in benchmarks/results/.")
@click.option("--seeds", default="0", show_default=True, help="Calibration seeds, with commas.")
@click.option("--samples", default=16, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--windows", default=30, show_default=True, help="Evaluation windows a text.")
@click.option("--calibration", help="Calibration text; default: the packaged one.")
@text_option
@click.option("--only", multiple=True, help="TOOL:METHOD; default: all.")
@click.option("--ours", help="Result file of quality/compare.py that the table shows as ours.")
@click.option("--time-against-ours", is_flag=True, help="Time pruning only, in turns with ours.")
@click.option("--ours-only", multiple=True, help="Which of ours to time; default: all.")
@click.option("--repeats", default=3, show_default=True, help="Turns of --time-against-ours.")
@click.option("--smoke", is_flag=True, help="One short window, nothing kept: does the script run?")
def main(
    *,
    model: str,
    result: str,
    seeds: str,
    samples: int,
    sequence_length: int,
    windows: int,
    calibration: str | None,
    texts: dict[str, str | None],
    only: tuple[str, ...],
    ours: str | None,
    time_against_ours: bool,
    ours_only: tuple[str, ...],
    repeats: int,
    smoke: bool,
) -> None:
    quiet_libraries()
    if smoke:
        samples, sequence_length, windows, repeats = 1, 32, 1, 1
        only = ("nvidia-modelopt:sparsegpt",)
    setting = Setting(
        model=model,
        pattern="2:4",
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        evaluation_windows=windows,
        evaluation_length=sequence_length,
        texts=texts,
    )
    wanted = chosen(only)
    with tempfile.TemporaryDirectory() as scratch:
        path = (Path(scratch) if smoke else RESULTS) / result
        if time_against_ours:
            spec = setting.calibration_spec(0)
            runs = time_in_turns(model, spec, wanted, ours_timed(ours_only), repeats)
            write_timings(path, model, spec, runs)
        else:
            _measure_all(setting, wanted, [int(seed) for seed in seeds.split(",")], path, ours)


def chosen(only: Sequence[str]) -> list[tuple[Peer, str]]:
    """Return the tools and methods that ``only`` names as TOOL:METHOD; all for none.

    Raises:
        PeerError: Nothing is called so.
    """
    known = {f"{peer.tool}:{method}": (peer, method) for peer in PEERS for method in peer.methods}
    for name in only:
        if name not in known:
            raise PeerError(f"--only {name}: not one of {', '.join(known)}")
    return [known[name] for name in only or known]


def _measure_all(
    setting: Setting,
    wanted: Sequence[tuple[Peer, str]],
    seeds: Sequence[int],
    path: Path,
    ours: str | None,
) -> None:
    runs = [PeerRun.from_json(run) for run in stored(path, setting)]
    for seed in seeds:
        for peer, method in wanted:
            if any(
                (run.worker.tool, run.worker.method, run.seed) == (peer.tool, method, seed)
                for run in runs
            ):
                continue
            click.echo(f"{peer.tool}, {method}, seed {seed}", err=True)
            runs.append(measure(setting, peer, method, seed))
            write_result(path, setting, ours=ours, runs=runs)
            click.echo(json.dumps(asdict(runs[-1])), err=True)


if __name__ == "__main__":
    main()
