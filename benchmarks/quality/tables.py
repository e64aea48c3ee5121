"""The tables of perplexities by method, from what ``benchmarks.quality.compare`` wrote."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.harness.markdown import head, line
from benchmarks.harness.results import RESULTS, Result, read_result
from benchmarks.quality.compare import default_variant
from benchmarks.quality.tasks import tasks_table
from sparseserve.sparsity import SparsityPattern

DENSE = "dense"
# What is done before a layer's operators are pruned, not after.
_BESIDE = {
    "scramble": "scrambled windows",
    "rotate": "rotated heads",
    "float32": "products in float32",
    "bfloat16": "products in bfloat16",
}
Run = dict[str, Any]
Settings = dict[str, Any]


def quality_table(result: Result) -> str:
    """Perplexity by method: mean and range over seeds."""
    setting, groups = result["setting"], by_variant(result["runs"])
    lines = _head([], setting)
    for variant, runs in groups.items():
        lines.append(line(*_method(variant), perplexities(runs, setting["texts"])))
    seeds = max(len(runs) for runs in groups.values())
    drawn = f"{seeds} calibration seeds (mean, lowest to highest; one where one figure stands)"
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, {tokens(setting):,} "
        f"calibration tokens of {calibration_text(setting['calibration'])}, "
        f"{drawn if seeds > 1 else 'one calibration seed'}, {measured([result])}"
    )
    return "\n".join(lines)


def sizes_table(result: Result) -> str:
    """Perplexity by the number of calibration tokens, for the variants that ``result`` has."""
    return _across(result, "samples", "calibration tokens", tokens, order=tokens)


def patterns_table(result: Result) -> str:
    """Perplexity by the share that is pruned, for the variants that ``result`` has."""
    return _across(result, "pattern", "pattern", itemgetter("pattern"), order=_kept)


def _across(
    result: Result,
    key: str,
    heading: str,
    value: Callable[[Settings], int | str],
    *,
    order: Callable[[Settings], float],
) -> str:
    """One table of all results whose settings differ in ``key`` alone; the first seed of each."""
    setting, wanted = result["setting"], by_variant(result["runs"])
    found = [each for each in _stored() if _but(key, each) == _but(key, result)]
    found.sort(key=lambda each: order(each["setting"]))
    lines = _head([heading], setting)
    shown = []
    for each in found:
        amount = value(each["setting"])
        first = by_variant(run for run in each["runs"] if run["seed"] == 0)
        for variant in wanted:
            if variant not in first or (variant == DENSE and each is not found[0]):
                continue
            shown.append({**each, "runs": first[variant]})
            cells = [_amount(amount) if variant != DENSE else "", *_method(variant)]
            lines.append(line(*cells, perplexities(first[variant], setting["texts"])))
    same = setting["pattern"] if key != "pattern" else f"{tokens(setting):,} calibration tokens"
    lines.append(
        f"\n`{Path(setting['model']).name}`, {same}, calibrated on "
        f"{calibration_text(setting['calibration'])}, one seed, {measured(shown)}"
    )
    return "\n".join(lines)


def _amount(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _kept(setting: Settings) -> float:
    """Return the share of weights kept, negative so that more is pruned further down."""
    return -SparsityPattern.parse(setting["pattern"]).density


def _stored() -> list[Result]:
    return [read_result(path) for path in sorted(RESULTS.glob("quality-*.json"))]


def _but(key: str, result: Result) -> Settings:
    return {name: value for name, value in result["setting"].items() if name != key}


def _head(before: list[str], setting: Settings) -> list[str]:
    texts = [f"perplexity, {text}" for text in setting["texts"]]
    return [head(*before, "method", "error correction", *texts)]


def tokens(setting: Settings) -> int:
    """Return how many tokens calibration sees."""
    return int(setting["samples"] * setting["sequence_length"])


def calibration_text(source: str | None) -> str:
    """Name the text of a ``CalibrationSpec.source``."""
    return f"`{Path(source).name}`" if source else "the packaged speeches"


def measured(results: Iterable[Result]) -> str:
    """Say on what, with what, by which code and when."""
    results = list(results)
    setting, machines = results[0]["setting"], [result["machine"] for result in results]
    runs = [run for result in results for run in result["runs"] if run["variant"] != DENSE]
    commits = list(dict.fromkeys(run["commit"] for run in runs))
    return (
        f"perplexity on {setting['evaluation_windows']} held-out windows of "
        f"{setting['evaluation_length']} tokens of each text; torch {machines[0]['torch']}, "
        f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}, "
        f"{max(machine['date'] for machine in machines)}."
    )


def by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group the seeds of each variant, in the order of the first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def perplexities(runs: list[Run], texts: Iterable[str]) -> str:
    """Return the cells of the texts: means, with ranges if there are several seeds."""
    return " | ".join(_spread([run["perplexity"][text] for run in runs]) for text in texts)


def label(variant: str) -> str:
    """Name a variant in words."""
    if variant == default_variant():
        return "the default recipe"
    if windows := further_windows(variant):
        return f"the recipe best, with {windows} further windows"
    method, correction = _method(variant)
    name, _, steps = method.partition(", ")
    return ", ".join([f"{name}, error correction {correction}", *([steps] if steps else [])])


def further_windows(variant: str) -> int | None:
    """Return on how many windows more ``variant`` trains if it is the recipe best; else None."""
    found = re.fullmatch(rf"{re.escape(default_variant())},rotate,distill@(\d+)", variant)
    return int(found[1]) if found else None


def _method(variant: str) -> tuple[str, str]:
    """Split a variant into the method, with its steps in words, and the error correction."""
    head, *steps = variant.split(",")
    method, _, correction = head.partition(":")
    method = re.sub(r"\[(.+)_(.+)=(.+)\]", r", \1 \2 \3", method)
    then = [_in_words(step) for step in steps if step not in _BESIDE]
    beside = [words for step, words in _BESIDE.items() if step in steps]
    correction = re.sub(r"@(.+)", r", weight \1", correction)
    return ", ".join([method, *beside, *(f"then {step}" for step in then)]), correction


def _in_words(step: str) -> str:
    name, _, amount = step.partition("@")
    counted = "further windows" if name == "distill" else "epochs"
    return f"{name} ({amount} {counted})" if amount else name


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    digits = 2 if mean < 1000 else 0
    if len(values) == 1 or math.isclose(min(values), max(values)):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


QUALITY_TABLES: dict[str, Callable[[Result], str]] = {
    "quality-smollm2-2of4": quality_table,
    "quality-smollm2-mixed": quality_table,
    "quality-gemma3-mixed": quality_table,
    "quality-smollm2-steps": quality_table,
    "rotation-smollm2": quality_table,
    "compute-smollm2": quality_table,
    "tasks-smollm2": tasks_table,
    "quality-smollm2-50percent-mixed": patterns_table,
    "quality-smollm2-corrections-50percent": patterns_table,
    "quality-smollm2-samples-8": sizes_table,
    "quality-gemma3-256": sizes_table,
}
