"""How much of a model can be pruned within a budget of perplexity, and does the budget hold?

The search chooses on calibration texts of two domains; the result is evaluated on evaluation texts
of the same domains, which neither pruning nor the search saw. Pruning is calibrated on both, too.
Beside it stands how well sensitivities agree between two halves of their windows: what a choice by
them can be worth. A budget that is already in the JSON is not measured again::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.assets mixed
    python -m benchmarks.quality.budget demo/models/smollm2-135m --budget 10% \
        --calibration demo/texts/mixed-calibration.txt --samples 64 \
        --other-validation demo/texts/wikipedia-calibration.txt \
        --text speeches=packaged --text wikipedia=demo/texts/wikipedia-evaluation.txt
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import click

from benchmarks.harness.evaluation_texts import PACKAGED, text_option
from benchmarks.harness.markdown import commit_and_date, head, line
from benchmarks.harness.results import RESULTS, Result, stored, write_result
from sparseserve.budget.price_run import HeldOutSpec
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.budget.report import BudgetReport, MaxPerplexityIncrease
from sparseserve.budget.within_budget import prune_within_budget
from sparseserve.cli.budget import parse_share
from sparseserve.cli.console import pruning_progress, quiet_libraries
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS, recipe_from_mapping
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every budget."""

    model: str
    recipe: dict[str, object]
    validation: tuple[str, ...]
    sensitivity_windows: int
    validation_windows: int
    evaluation_windows: int
    texts: dict[str, str | None]
    dense_perplexity: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One budget: what was found, what it costs, and what the search took.

    ``rounds`` holds the sparse share, the predicted and the bounded increase of each round.
    """

    budget: float
    sparse_share: float
    dense_operators: tuple[str, ...]
    weight_bytes: int
    dense_bytes: int
    perplexity: dict[str, float]
    increase: dict[str, float]
    rounds: tuple[tuple[float, float, float], ...]
    seconds: float


def split_half_agreement(units: Sequence[UnitSensitivity]) -> dict[str, float]:
    """Return rank correlations with the loss increases of the other half of the windows.

    Windows are dealt to the halves in turns, so both halves hold every text.
    """

    def half(values: Sequence[float], parity: int) -> float:
        return statistics.fmean(values[parity::2])

    def against(first: Callable[[UnitSensitivity], Sequence[float]], parity: int) -> float:
        return statistics.correlation(
            _ranks([half(first(unit), parity) for unit in units]),
            _ranks([half(unit.loss_increases, 1 - parity) for unit in units]),
        )

    return {
        "loss increase": statistics.fmean(
            against(lambda unit: unit.loss_increases, parity) for parity in (0, 1)
        ),
        "divergence": statistics.fmean(
            against(lambda unit: unit.divergences, parity) for parity in (0, 1)
        ),
    }


def _ranks(values: Sequence[float]) -> list[int]:
    """Return the place of each value in ascending order."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    return [order.index(index) for index in range(len(values))]


def perplexities(
    model: str, texts: dict[str, str | None], spec: EvaluationSpec
) -> dict[str, float]:
    return {
        name: evaluate(model, replace(spec, text=text)).perplexity for name, text in texts.items()
    }


def measure(setting: Setting, share: float, spec: EvaluationSpec) -> tuple[Run, BudgetReport]:
    with tempfile.TemporaryDirectory() as scratch, pruning_progress() as progress:
        started = time.perf_counter()
        artifact, report = prune_within_budget(
            Job(setting.model, recipe_from_mapping(setting.recipe), progress=progress),
            Path(scratch) / "pruned",
            MaxPerplexityIncrease(share),
            held_out=_held_out(setting),
        )
        seconds = time.perf_counter() - started
        found = perplexities(str(artifact.path), setting.texts, spec)
    run = Run(
        budget=share,
        sparse_share=report.chosen.sparse_share,
        dense_operators=report.chosen.dense_operators,
        weight_bytes=report.weight_bytes,
        dense_bytes=report.dense_bytes,
        perplexity=found,
        increase={name: found[name] / setting.dense_perplexity[name] - 1 for name in found},
        rounds=tuple(
            (item.sparse_share, math.expm1(item.predicted), math.expm1(item.bound))
            for item in report.rounds
        ),
        seconds=seconds,
    )
    return run, report


def _recipe(calibration: str | None, samples: int, sequence_length: int) -> PruneRecipe:
    default = PRESETS["default"]
    drawn = replace(
        default.calibration, source=calibration, samples=samples, sequence_length=sequence_length
    )
    return replace(default, calibration=drawn)


def _held_out(setting: Setting) -> HeldOutSpec:
    return HeldOutSpec(
        texts=tuple(_file(text) for text in setting.validation),
        sensitivity_windows=setting.sensitivity_windows,
        validation_windows=setting.validation_windows,
    )


@click.command()
@click.argument("model", required=False)
@click.option("--result", default="budget-smollm2-2of4.json", show_default=True)
@click.option("--budget", "budgets", multiple=True, default=("10%",), show_default=True)
@click.option("--calibration", help="Calibration text; default: the packaged one.")
@click.option("--samples", default=16, show_default=True, help="Calibration windows.")
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--sensitivity-windows", default=4, show_default=True, help="A text.")
@click.option("--validation-windows", default=32, show_default=True, help="A text.")
@click.option("--windows", default=30, show_default=True, help="Evaluation windows a text.")
@click.option("--other-validation", help="Calibration text of another domain.")
@text_option
@click.option("--smoke", is_flag=True, help="A tiny model; writes nothing.")
def main(
    *,
    model: str | None,
    result: str,
    budgets: tuple[str, ...],
    calibration: str | None,
    samples: int,
    sequence_length: int,
    sensitivity_windows: int,
    validation_windows: int,
    windows: int,
    other_validation: str | None,
    texts: dict[str, str | None],
    smoke: bool,
) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        if smoke:
            model, sequence_length, windows = str(save_tiny_model("llama", Path(scratch))), 64, 4
            sensitivity_windows, validation_windows, budgets = 2, 4, ("1000%",)
        if model is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        spec = EvaluationSpec(samples=windows, sequence_length=sequence_length)
        setting = Setting(
            model=model,
            recipe=_recipe(calibration, samples, sequence_length).to_json(),
            validation=(PACKAGED, other_validation) if other_validation else (PACKAGED,),
            sensitivity_windows=sensitivity_windows,
            validation_windows=validation_windows,
            evaluation_windows=windows,
            texts=texts,
            dense_perplexity=perplexities(model, texts, spec),
        )
        _run(None if smoke else RESULTS / result, setting, budgets, spec)


def _run(path: Path | None, setting: Setting, budgets: Sequence[str], spec: EvaluationSpec) -> None:
    """Measure the ``budgets`` that the JSON at ``path`` lacks; None for ``path`` writes nothing."""
    runs = [] if path is None else stored(path, setting)
    for budget in budgets:
        share = parse_share("--budget", budget)
        if any(run["budget"] == share for run in runs):
            continue
        run, report = measure(setting, share, spec)
        runs.append(asdict(run))
        click.echo(json.dumps({k: v for k, v in runs[-1].items() if k != "dense_operators"}))
        if path is not None:
            write_result(
                path,
                setting,
                agreement=split_half_agreement(report.sensitivities),
                sensitivities=report.sensitivities,
                runs=runs,
            )


def _file(text: str) -> str:
    """Return the file of a calibration text; a result must not name where the package lies."""
    if text != PACKAGED:
        return text
    return str(resources.files("sparseserve").joinpath("data", "calibration.txt"))


def budget_table(result: Result) -> str:
    """What each budget allows, and whether it held on the evaluation texts."""
    setting, machine = result["setting"], result["machine"]
    texts, calibration = list(setting["texts"]), setting["recipe"]["calibration"]
    increases = [f"increase, {text}" for text in texts]
    lines = [head("budget", "pruned share", "size", *increases, "models tried")]
    for run in sorted(result["runs"], key=lambda run: float(run["budget"])):
        size = run["weight_bytes"] / run["dense_bytes"]
        shares = [f"{run['budget']:.0%}", f"{run['sparse_share']:.1%}", f"{size:.1%}"]
        found = [f"{run['increase'][text]:+.1%}" for text in texts]
        lines.append(line(*shares, *found, str(len(run["rounds"]))))
    lines.append(
        f"\n`{Path(setting['model']).name}`, 2:4, the default recipe with "
        f"{calibration['samples']} windows of {calibration['sequence_length']} tokens; the share "
        "is of the weights that may be pruned, the size that of all weights on disk; perplexity "
        f"against the dense model's on {setting['evaluation_windows']} windows of each evaluation "
        f"text; {commit_and_date(machine)}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
