"""Does a better pruner still matter once the pruned model is retrained?

Wanda, SparseGPT and the default recipe, the first two with and without DSnoT, each as pruned and
retrained as PERP does, and the last also towards the dense model's predictions. DSnoT puts dense
values on an exchanged mask, so after a pruner that computes values it would throw these away; it is
combined with the masks of Wanda and SparseGPT, and followed by a refit of the values. All runs see
the same windows; retraining sees those of calibration and no others. Each run is written to the
JSON as soon as it is done; runs already there are not repeated::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.assets wikipedia
    python -m benchmarks.quality.retraining demo/models/smollm2-135m \
        --text speeches=packaged --text wikipedia=demo/texts/wikipedia-evaluation.txt
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from benchmarks.harness.evaluation_texts import text_option
from benchmarks.harness.markdown import head, line
from benchmarks.harness.results import RESULTS, Result, stored, write_result
from benchmarks.quality.tables import calibration_text
from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.cli.console import pruning_progress, quiet_libraries
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.models.loading import load_model
from sparseserve.pruners.dsnot import Dsnot
from sparseserve.pruners.magnitude import Magnitude
from sparseserve.pruners.refit import Refit
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS, UNTRAINED
from sparseserve.report import PruneReport
from sparseserve.retraining.losses import DensePrediction, dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.retraining.settings import Retraining
from sparseserve.text import evaluation_windows, read_text
from sparseserve.text.calibration import CalibrationSpec, load_calibration
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export

PRUNERS = {
    "wanda": replace(UNTRAINED, pruner=Wanda(), error_correction="none"),
    "wanda, DSnoT": replace(UNTRAINED, pruner=Dsnot("wanda"), error_correction="none"),
    "wanda, DSnoT, refit": replace(UNTRAINED, pruner=Refit("dsnot"), error_correction="none"),
    "sparsegpt": replace(UNTRAINED, pruner=SparseGPT(), error_correction="none"),
    "sparsegpt, DSnoT": replace(UNTRAINED, pruner=Dsnot("sparsegpt"), error_correction="none"),
    "default": PRESETS["default"],
}
SMOKE_PRUNERS = {"magnitude": replace(UNTRAINED, pruner=Magnitude(), error_correction="none")}
AS_PRUNED, PERP, DISTILLED = "none", "PERP", "distillation"
# Both losses where it matters most; PERP, the question asked, everywhere.
KINDS = {"default": (AS_PRUNED, PERP, DISTILLED), "magnitude": (AS_PRUNED, PERP, DISTILLED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every run; ``retraining`` apart from its loss."""

    model: str
    calibration: dict[str, Any]
    retraining: dict[str, Any]
    evaluation_windows: int
    texts: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pruner and one way to retrain.

    ``held_out_before`` and ``held_out_after`` are cross-entropies in nats on the windows that
    retraining held out; ``seconds`` is the time of pruning, or of retraining alone.
    """

    pruner: str
    retraining: str
    perplexity: dict[str, float]
    seconds: float
    kept_epoch: int | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None


@dataclass(frozen=True, slots=True)
class Materials:
    """Windows of the dense model's tokenizer and the dense model's predictions."""

    calibration: tuple[Tensor, ...]
    dense: tuple[DensePrediction, ...]
    evaluation: dict[str, list[Tensor]]


def gather(setting: Setting, likeliest: int) -> tuple[Materials, Run]:
    """Read all windows, and measure the dense model while it is at hand."""
    loaded = load_model(setting.model)
    spec = CalibrationSpec(**setting.calibration)
    calibration = load_calibration(spec, loaded.tokenizer, None).windows
    evaluation = {
        name: evaluation_windows(
            loaded.tokenizer,
            read_text(text, packaged="evaluation"),
            sequence_length=len(calibration[0]),
            samples=setting.evaluation_windows,
        )
        for name, text in setting.texts.items()
    }
    found = {name: perplexity(loaded.model, each).perplexity for name, each in evaluation.items()}
    dense = tuple(dense_predictions(loaded.model, calibration, likeliest))
    run = Run(pruner="dense", retraining=AS_PRUNED, perplexity=found, seconds=0.0)
    return Materials(calibration, dense, evaluation), run


def prune(setting: Setting, recipe: PruneRecipe, folder: Path) -> Artifact:
    """Prune, unless ``folder`` already holds the result."""
    if (folder / MANIFEST_FILE).exists():
        return Artifact.open(folder)
    drawn = CalibrationSpec(**setting.calibration)
    recipe = replace(recipe, calibration=replace(drawn, scrambled=recipe.calibration.scrambled))
    with pruning_progress() as progress:
        return prune_and_export(Job(setting.model, recipe, "dense", progress=progress), folder)


def measure(artifact: Artifact, pruner: str, kind: str, setting: Setting, have: Materials) -> Run:
    """Retrain the pruned model in the way ``kind`` says and measure it."""
    model = load_model(artifact.path).model
    run = Run(
        pruner=pruner,
        retraining=kind,
        perplexity={},
        seconds=PruneReport.from_json(artifact.manifest.report).seconds,
    )
    if kind != AS_PRUNED:
        knobs = Retraining(**setting.retraining, distillation=1.0 if kind == DISTILLED else 0.0)
        started = time.perf_counter()
        report = retrain(
            model,
            artifact.manifest.pruned,
            have.calibration,
            knobs,
            dense=have.dense,
            on_window=lambda done, total, loss: click.echo(
                f"\r{pruner}, {kind}: window {done} of {total}, loss {loss:.3f}", nl=False, err=True
            ),
        )
        run = replace(
            run,
            seconds=time.perf_counter() - started,
            kept_epoch=report.kept_epoch,
            held_out_before=report.before.cross_entropy,
            held_out_after=report.after.cross_entropy,
        )
    found = {name: perplexity(model, each).perplexity for name, each in have.evaluation.items()}
    return replace(run, perplexity=found)


def missing(runs: Sequence[Run], pruners: Iterable[str]) -> dict[str, list[str]]:
    """Return which ways of retraining are still to be measured for each pruner."""
    done = {(run.pruner, run.retraining) for run in runs}
    wanted = {
        pruner: [
            kind for kind in KINDS.get(pruner, (AS_PRUNED, PERP)) if (pruner, kind) not in done
        ]
        for pruner in pruners
    }
    return {pruner: kinds for pruner, kinds in wanted.items() if kinds}


@click.command()
@click.argument("model")
@click.option("--result", default="retraining-smollm2-2of4.json", show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--calibration", help="Calibration text; default: the packaged one.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--windows", default=30, show_default=True, help="Evaluation windows a text.")
@text_option
@click.option("--only", multiple=True, type=click.Choice(list(PRUNERS)), help="Default: all.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep pruned models here.")
@click.option("--smoke", is_flag=True, help="Magnitude and one epoch: does the script run?")
def main(
    *,
    model: str,
    result: str,
    samples: int,
    sequence_length: int,
    calibration: str | None,
    epochs: int,
    windows: int,
    texts: dict[str, str | None],
    only: tuple[str, ...],
    work: Path | None,
    smoke: bool,
) -> None:
    quiet_libraries()
    knobs = Retraining(epochs=1 if smoke else epochs)
    chosen = {key: value for key, value in asdict(knobs).items() if key != "distillation"}
    setting = Setting(
        model=model,
        calibration=asdict(
            CalibrationSpec(
                source=calibration,
                samples=samples,
                sequence_length=sequence_length,
                scrambled=0,
            )
        ),
        retraining=chosen,
        evaluation_windows=windows,
        texts=texts,
    )
    path = RESULTS / result
    runs = [Run(**run) for run in stored(path, setting)]
    recipes = SMOKE_PRUNERS if smoke else {name: PRUNERS[name] for name in only or PRUNERS}
    todo = missing(runs, recipes)
    if not todo:
        return
    have, dense = gather(setting, knobs.likeliest)
    runs = runs or [dense]
    with tempfile.TemporaryDirectory() as scratch:
        for pruner, kinds in todo.items():
            folder = (work or Path(scratch)) / pruner.replace(", ", "-")
            artifact = prune(setting, recipes[pruner], folder)
            for kind in kinds:
                runs.append(measure(artifact, pruner, kind, setting, have))
                click.echo(f"\n{json.dumps(asdict(runs[-1]))}", err=True)
                write_result(path, setting, runs=runs)


def retraining_table(result: Result) -> str:
    """Perplexity and seconds of every pruner, as pruned and retrained."""
    setting, machine = result["setting"], result["machine"]
    texts = list(setting["texts"])
    perplexities = [f"perplexity, {text}" for text in texts]
    lines = [head("pruner", "retraining", *perplexities, "held-out cross-entropy", "seconds")]
    for run in sorted(result["runs"], key=lambda run: _row(run["pruner"])):
        cells = [f"{run['perplexity'][text]:.2f}" for text in texts]
        held_out = ""
        if run["held_out_before"] is not None:
            held_out = f"{run['held_out_before']:.3f} to {run['held_out_after']:.3f}"
        lines.append(
            line(run["pruner"], run["retraining"], *cells, held_out, f"{run['seconds']:.0f}")
        )
    calibration, knobs = setting["calibration"], setting["retraining"]
    lines.append(
        f"\n`{Path(setting['model']).name}`, 2:4, {calibration['samples']} calibration windows of "
        f"{calibration['sequence_length']} tokens of "
        f"{calibration_text(calibration['source'])}, one seed; retraining: "
        f"rank {knobs['rank']}, learning rate {knobs['learning_rate']:g}, {knobs['epochs']} epochs "
        f"over the same windows; perplexity on {setting['evaluation_windows']} windows of each "
        f"text; seconds are those of pruning, or of retraining alone; {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}."
    )
    return "\n".join(lines)


def _row(pruner: str) -> int:
    """Return the place of a pruner in the table, the dense model first."""
    return list(PRUNERS).index(pruner) if pruner in PRUNERS else -1


if __name__ == "__main__":
    main()
