"""How much perplexity does each method cost at equal calibration?

Every method prunes the same model to the same pattern with the same calibration windows, once a
seed, and is evaluated on text of the calibration's domain and on text of another. Each run is
written to the JSON as soon as it is done; runs already there are not repeated, and one that was
killed goes on from the layer it had reached (``demo/unfinished``)::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.assets wikipedia
    python -m benchmarks.quality.compare demo/models/smollm2-135m \
        --result quality-smollm2-2of4.json --text speeches=packaged \
        --text wikipedia=demo/texts/wikipedia-evaluation.txt

A variant is written ``METHOD:CORRECTION``, then ``@W`` for the weight of ``intra+inter``, then
``,reconstruct`` (``@N`` for N epochs, not the default's), ``,retrain`` and ``,distill@N`` (on N
fresh windows) for the steps after pruning, ``,rotate`` for rotated heads, ``,scramble`` for a
scrambled copy of each window beside it, ``,float32`` or ``,bfloat16`` for what products inside
layers are computed in. The method of a preset has the knobs it has there; one of
them can be set in brackets::

    --only sparsegpt:sequential --only admm:intra+inter@0.5 --only admm:intra,retrain
    --only 'fista-paper[warm_start=admm]:intra'

The name of a preset is a variant, too: all of that recipe but the number and length of windows::

    --only default --only parallel
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.evaluation_texts import text_option
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import RESULTS, stored, write_result
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.cli.console import pruning_progress, quiet_libraries
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS, recipe_from_mapping
from sparseserve.report import PruneReport
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import SparsityPattern
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export

UNFINISHED = Path("demo/unfinished")
_COMPUTED = ("float32", "bfloat16")
_STEPS = {"reconstruct", "retrain", "distill", "rotate", "scramble", *_COMPUTED}
VARIANTS = (
    "magnitude:none",
    "wanda:sequential",
    "sparsegpt:sequential",
    "fista:intra",
    "admm:intra+inter",
    "admm:intra+inter,reconstruct",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every method."""

    model: str
    pattern: str
    calibration: str | None
    samples: int
    sequence_length: int
    evaluation_windows: int
    evaluation_length: int
    texts: dict[str, str | None]

    def calibration_spec(self, seed: int) -> CalibrationSpec:
        return CalibrationSpec(
            source=self.calibration,
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=seed,
            scrambled=0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One variant with one seed, by the code of ``commit``; ``dense`` is the model itself."""

    variant: str
    seed: int
    perplexity: dict[str, float]
    mean_relative_error: float
    seconds: float
    peak_memory_bytes: int
    gram_products: int
    commit: str


def recipe_of(variant: str, setting: Setting, seed: int) -> PruneRecipe:
    """Read a variant, as the head of this file defines it."""
    if variant in PRESETS:
        preset = PRESETS[variant]
        copies = preset.calibration.scrambled
        return replace(
            preset,
            pattern=SparsityPattern.parse(setting.pattern),
            calibration=replace(setting.calibration_spec(seed), scrambled=copies),
        )
    head, *steps = variant.split(",")
    method, _, correction = head.partition(":")
    method, _, knob = method.rstrip("]").partition("[")
    correction, _, weight = correction.partition("@")
    arguments = dict(step.partition("@")[::2] for step in steps)
    if unknown := set(arguments) - _STEPS:
        raise click.UsageError(f"{variant}: no such step: {', '.join(sorted(unknown))}")
    usual: dict[str, Any] = {
        preset.method: preset.to_json()["method"] for preset in PRESETS.values()
    }
    chosen = dict([knob.partition("=")[::2]]) if knob else {}
    data: dict[str, object] = {
        "pattern": setting.pattern,
        "method": {"name": method, **usual.get(method, {}), **chosen},
        "error_correction": correction or "none",
        "reconstruction": {"epochs": 0},
        "rotate": "heads" if "rotate" in arguments else "none",
        "compute_dtype": next((name for name in _COMPUTED if name in arguments), "auto"),
        "calibration": asdict(
            replace(setting.calibration_spec(seed), scrambled=int("scramble" in arguments))
        ),
    }
    if weight:
        data["inter_weight"] = float(weight)
    if "reconstruct" in arguments:
        training = PRESETS["default"].reconstruction
        epochs = int(arguments["reconstruct"] or training.epochs)
        data["reconstruction"] = asdict(replace(training, epochs=epochs))
    if "retrain" in arguments:
        data["retraining"] = {"epochs": 3}
    if "distill" in arguments:
        data["retraining"] = asdict(Retraining().distilling(int(arguments["distill"])))
    return recipe_from_mapping(data)


def default_variant() -> str:
    """Return how the default recipe is written here."""
    recipe = PRESETS["default"]
    step = ",reconstruct" if recipe.reconstruction.epochs else ""
    beside = ",scramble" if recipe.calibration.scrambled else ""
    return f"{recipe.method}:{recipe.error_correction}{step}{beside}"


def measure(setting: Setting, variant: str, seed: int, scratch: Path) -> Run:
    """Prune and evaluate; what a killed run of the same code left in ``scratch`` goes on."""
    commit = Machine.here().commit
    out = scratch / f"{variant.replace(':', '-')}-{seed}-{commit}"
    if out.exists():
        artifact = Artifact.open(out)
    else:
        with pruning_progress() as progress:
            recipe = recipe_of(variant, setting, seed)
            job = Job(setting.model, recipe, "dense", progress=progress)
            artifact = prune_and_export(job, out)
    report = PruneReport.from_json(artifact.manifest.report)
    run = Run(
        variant=variant,
        seed=seed,
        perplexity=perplexities(setting, str(out)),
        mean_relative_error=report.mean_relative_error,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        gram_products=max(operator.gram_products for operator in report.operators),
        commit=commit,
    )
    shutil.rmtree(out)
    return run


def perplexities(setting: Setting, model: str) -> dict[str, float]:
    spec = EvaluationSpec(
        samples=setting.evaluation_windows, sequence_length=setting.evaluation_length
    )
    return {
        name: evaluate(model, replace(spec, text=text)).perplexity
        for name, text in setting.texts.items()
    }


@click.command()
@click.argument("model")
@click.option("--result", required=True, help="File name in benchmarks/results/.")
@click.option("--pattern", default="2:4", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Calibration seeds.")
@click.option("--samples", default=16, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--windows", default=30, show_default=True, help="Evaluation windows a text.")
@click.option("--calibration", help="Calibration text; default: the packaged one.")
@text_option
@click.option("--only", multiple=True, help="A variant, see above; default: the usual ones.")
@click.option("--smoke", is_flag=True, help="One seed, magnitude only: does the script run?")
def main(
    *,
    model: str,
    result: str,
    pattern: str,
    seeds: str,
    samples: int,
    sequence_length: int,
    windows: int,
    calibration: str | None,
    texts: dict[str, str | None],
    only: tuple[str, ...],
    smoke: bool,
) -> None:
    quiet_libraries()
    setting = Setting(
        model=model,
        pattern=pattern,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        evaluation_windows=windows,
        evaluation_length=sequence_length,
        texts=texts,
    )
    chosen = ["magnitude:none"] if smoke else list(only or VARIANTS)
    path = RESULTS / result
    runs = [Run(**run) for run in stored(path, setting)]
    if not any(run.variant == "dense" for run in runs):
        runs.append(_dense(setting))
    first, *others = (int(seed) for seed in seeds.split(","))
    for seed in [first] if smoke else [first, *others]:
        for variant in chosen:
            # Magnitude sees no calibration text, so one seed is all.
            if seed != first and variant.startswith("magnitude"):
                continue
            if any((run.variant, run.seed) == (variant, seed) for run in runs):
                continue
            click.echo(f"{variant}, seed {seed}", err=True)
            runs.append(measure(setting, variant, seed, UNFINISHED / path.stem))
            write_result(path, setting, runs=runs)
            click.echo(json.dumps(asdict(runs[-1])), err=True)


def _dense(setting: Setting) -> Run:
    return Run(
        variant="dense",
        seed=0,
        perplexity=perplexities(setting, setting.model),
        mean_relative_error=0.0,
        seconds=0.0,
        peak_memory_bytes=0,
        gram_products=0,
        commit=Machine.here().commit,
    )


if __name__ == "__main__":
    main()
