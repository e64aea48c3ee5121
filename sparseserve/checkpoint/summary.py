"""What a manifest says in words: what was done, what stays dense and why, what the loss is.

The model card and the page of ``sparseserve report`` both say it. All of it depends on the model,
the recipe and the text alone: no time, no date and no machine, so equal runs say equal things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Manifest
from sparseserve.errors import ArtifactError, first_line
from sparseserve.paths import shown_value
from sparseserve.report import PruneReport, QuantizationReport

#: Key of ``Manifest.report``: the name on the hub of the model that was pruned, if it has one.
BASE_MODEL = "base_model"
#: Likewise: the name of its folder, where ``Manifest.source`` (``.``, ``..``) does not end in it.
BASE_FOLDER = "base_folder"
_ASKED = "left dense as asked (ignore, or experts = dense, in the recipe)"
_BUDGET = "pruning it costs most for its size, and a budget was set"
_NOT_TWO_FOUR = "its weights were not in the pattern"
_NEVER = "embeddings, norms, biases and the output head: no method here prunes them"
_CORRECTIONS = {
    "none": "none: each operator saw dense inputs",
    "intra": "within each decoder layer",
    "intra+inter": "within each decoder layer, and {share:.0%} of the errors of the layers before",
    "sequential": "none of its own: each operator saw what the pruned layers before it produce",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was done or is so, and how."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """Modules that stay dense for one reason; ``names`` is empty where the reason names them."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MeasuredText:
    """Perplexity of the dense and of the pruned model on windows that pruning did not see."""

    text: str
    dense_perplexity: float
    perplexity: float

    @property
    def gap(self) -> float:
        """ln(perplexity / dense perplexity)."""
        return math.log(self.perplexity / self.dense_perplexity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A manifest in words.

    Attributes:
        base: The model that was pruned: its name on the hub, or the last part of its path.
        hub_name: Its name on the hub; None where it came from a folder.
        trained: Whether the whole model was trained after it was pruned.
        steps: What was done.
        dense: What stays dense, reason by reason.
        measured: The loss as the run itself measured it; empty where it did not.
        report: The results of pruning; None where another tool pruned.
    """

    base: str
    hub_name: str | None
    trained: bool
    steps: tuple[Fact, ...]
    dense: tuple[DenseGroup, ...]
    measured: tuple[MeasuredText, ...]
    report: PruneReport | None


def summarise(manifest: Manifest) -> Summary:
    """Say what ``manifest`` says, of whatever release it is.

    Raises:
        ArtifactError: Its recipe or its report lacks something, or has it of another type.
    """
    try:
        report = _checked_report(manifest) if "layers" in manifest.report else None
        hub_name = manifest.report.get(BASE_MODEL)
        folder = manifest.report.get(BASE_FOLDER) or PurePath(manifest.source).name
        return Summary(
            base=str(hub_name or folder or manifest.source),
            hub_name=None if hub_name is None else str(hub_name),
            trained=bool(report and report.retraining and report.retraining.kept_epoch),
            steps=tuple(_steps(manifest, report)),
            dense=tuple(_dense(manifest, report)),
            measured=tuple(_measured(manifest)),
            report=report,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{MANIFEST_FILE}: recipe or report is not as sparseserve writes it "
            f"({first_line(error)}): use the release that wrote it, or make the checkpoint again"
        ) from error


def _checked_report(manifest: Manifest) -> PruneReport:
    """Read the results of pruning, whose names and figures are told and drawn."""
    report = PruneReport.from_json(manifest.report)
    names = [layer.name for layer in report.layers] + [item.name for item in report.operators]
    figures = [item.relative_error for item in report.operators]
    figures += [report.seconds, report.peak_memory_bytes]
    for layer in report.layers:
        if trained := layer.reconstruction:
            figures += [trained.error_before, trained.error_after, trained.epochs]
    for kind, values in (("name", names), ("number", figures)):
        wanted = str if kind == "name" else int | float
        for value in values:
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise TypeError(f"{shown_value(value)} is no {kind}")
    return report


def _steps(manifest: Manifest, report: PruneReport | None) -> Iterator[Fact]:
    yield Fact("pattern", _pattern(manifest.pattern))
    yield Fact("pruned", f"{len(manifest.pruned):,} linear operators")
    if "method" in manifest.recipe:
        yield from _recipe_steps(manifest.recipe, report)
    if converted := manifest.report.get("converted"):
        yield Fact("pruned by", f"another tool; read from {', '.join(converted['formats'])}")
    if manifest.calibration:
        yield Fact("calibration text", _calibration(manifest.calibration, manifest.recipe))
    if rounded := manifest.report.get("rounded"):
        yield Fact("rounded", f"pruned weights from {rounded['from']} to {rounded['to']}")
    if quantised := manifest.report.get("quantization"):
        yield Fact("quantised", _quantised(QuantizationReport(**quantised)))
    if onnx := manifest.report.get("onnx"):
        yield Fact("dtype of the graph", str(onnx["dtype"]))
    if report and report.layers:
        yield Fact(
            "error of the operators",
            f"{report.mean_relative_error:.4f}, mean of the relative error of each operator's "
            "outputs on the calibration text, before any training",
        )


def _recipe_steps(recipe: Mapping[str, Any], report: PruneReport | None) -> Iterator[Fact]:
    knobs = {key: value for key, value in recipe["method"].items() if key != "name"}
    told = ", ".join(f"{key} {_plain(value)}" for key, value in knobs.items())
    yield Fact("method", f"{recipe['method']['name']}{f' ({told})' if told else ''}")
    correction = str(recipe["error_correction"])
    meaning = _CORRECTIONS.get(correction, correction)
    yield Fact("error correction", meaning.format(share=recipe["inter_weight"]))
    if rotated := sum(len(layer.rotations) for layer in report.layers) if report else 0:
        yield Fact(
            "rotated heads", f"the values of attention in {_count(rotated, 'layer', 'layers')}"
        )
    yield Fact("training of each layer", _reconstruction(recipe["reconstruction"], report))
    yield Fact("training of the whole model", _retraining(recipe["retraining"], report))
    if report and report.compute_dtype:
        yield Fact("products inside layers", f"computed in {report.compute_dtype}")


def _pattern(pattern: str) -> str:
    keep, colon, group = pattern.partition(":")
    if colon:
        return f"{pattern}: of every {group} neighbouring weights of a row at most {keep} are kept"
    return f"{pattern} of the weights are zero, anywhere in the matrix"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(str(value.get("name", "")).split()) or "of its own"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reconstruction(knobs: Mapping[str, Any], report: PruneReport | None) -> str:
    if not knobs["epochs"]:
        return "none"
    text = f"towards its dense outputs, up to {knobs['epochs']} passes over the windows"
    done = [layer.reconstruction for layer in report.layers] if report else []
    kept = sum(bool(item and item.epochs) for item in done)
    return f"{text}; it helped {kept} of {len(done)} layers" if done else text


def _retraining(knobs: Mapping[str, Any], report: PruneReport | None) -> str:
    if not knobs["epochs"]:
        return "none"
    windows = "the windows"
    if fresh := knobs.get("fresh"):
        windows = f"{fresh:,} windows that pruning did not see"
    passes = _count(knobs["epochs"], "pass", "passes")
    text = f"up to {passes} over {windows}, zeros kept"
    found = report.retraining if report else None
    if found is None:
        return text
    losses = f"{found.before.loss:.4f} before, {found.after.loss:.4f} after"
    kept = f"pass {found.kept_epoch} was kept" if found.kept_epoch else "none made it better"
    return f"{text}; {kept}, loss on held-out windows {losses}"


def _quantised(found: QuantizationReport) -> str:
    size = found.group_size
    text = f"kept weights to {found.to}, one scale for "
    text += f"each {size} inputs of a row" if size else "each row"
    if found.mean_relative_error is None:
        return f"{text}; each to the nearest"
    error = found.mean_relative_error
    text += f"; errors repaired on the calibration text, {error:.4f} of the outputs is left"
    if found.scaled:
        inputs = _count(found.scaled, "input", "inputs")
        text += f"; the channels of {inputs} scaled first, so that int8 inputs lose less"
    return text


def _calibration(calibration: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    text = f"{calibration['name']}: {calibration['samples']:,} windows"
    text += f" of {calibration['sequence_length']:,} tokens, seed {calibration['seed']}"
    asked = recipe.get("calibration", {})
    if copies := asked.get("scrambled"):
        layers = _count(asked["scrambled_layers"], "layer", "layers")
        text += f", and {_count(copies, 'scrambled copy', 'scrambled copies')} of each for the "
        text += f"first {layers}"
    return text


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _dense(manifest: Manifest, report: PruneReport | None) -> Iterator[DenseGroup]:
    reasons: dict[str, list[str]] = {}
    if report:
        budget = frozenset(_budget(manifest).get("dense_operators", ()))
        for name in report.dense_modules:
            other = _BUDGET if name in budget else _ASKED
            reasons.setdefault(str(report.dense_reasons.get(name, other)), []).append(name)
    if converted := manifest.report.get("converted"):
        reasons[_NOT_TWO_FOUR] = list(converted["dense_linears"])
    for reason, names in reasons.items():
        if names:
            yield DenseGroup(reason, tuple(str(name) for name in names))
    yield DenseGroup(_NEVER, ())


def _budget(manifest: Manifest) -> Mapping[str, Any]:
    """Return the round that was published within a budget; empty without one."""
    chosen: Mapping[str, Any] = manifest.report.get("budget", {}).get("chosen", {})
    return chosen


def _measured(manifest: Manifest) -> Iterator[MeasuredText]:
    for item in _budget(manifest).get("measured", ()):
        dense, pruned = float(item["dense_perplexity"]), float(item["perplexity"])
        if not (0 < dense < math.inf and 0 < pruned < math.inf):
            raise ValueError(f"perplexity {pruned} against {dense}")
        yield MeasuredText(str(item["text"]), dense, pruned)
