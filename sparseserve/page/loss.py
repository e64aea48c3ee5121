"""The section on the loss by operator and decoder layer: charts, and tables of the same figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparseserve.page.charts import Strip, strips
from sparseserve.page.markup import Content, Html, element, folded, joined, table
from sparseserve.report import LayerReport, PruneReport

# The numbers of experts, and of whatever else a layer has many of.
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class ErrorGrid:
    """Relative errors by kind of operator and decoder layer.

    Attributes:
        layers: Names of the layers, first to last.
        errors: For each kind the errors in each layer: one, none, or those of all experts.
    """

    layers: tuple[str, ...]
    errors: dict[str, tuple[tuple[float, ...], ...]]

    @classmethod
    def of(cls, layers: Sequence[LayerReport]) -> ErrorGrid:
        """Sort the operators of all layers by their kind."""
        found: dict[str, list[list[float]]] = {}
        for number, layer in enumerate(layers):
            for operator in layer.operators:
                kind = _kind(operator.name, layer.name)
                rows = found.setdefault(kind, [[] for _ in layers])
                rows[number].append(operator.relative_error)
        errors = {kind: tuple(map(tuple, rows)) for kind, rows in found.items()}
        return cls(tuple(layer.name for layer in layers), errors)

    def all_of(self, kind: str) -> list[float]:
        """Return the errors of a kind in all layers."""
        return [error for errors in self.errors[kind] for error in errors]


def loss_section(report: PruneReport) -> Html:
    """Return charts and tables of the errors of operators and layers."""
    grid = ErrorGrid.of(report.layers)
    return joined((*_operators(grid), *_layers(report.layers)))


def _kind(operator: str, layer: str) -> str:
    return _NUMBER.sub(".*", operator.removeprefix(f"{layer}."))


def _operators(grid: ErrorGrid) -> Iterator[Html]:
    yield element(
        "p",
        "The relative error of an operator is the size of the change of its outputs over the size "
        "of its outputs, on the calibration text, as it was pruned and before any training. The "
        "higher a bar, the more was lost. All bars have one scale.",
    )
    rows = [
        Strip(
            kind,
            tuple(statistics.fmean(errors) if errors else None for errors in layers),
            f"mean {statistics.fmean(grid.all_of(kind)):.3f}",
        )
        for kind, layers in grid.errors.items()
    ]
    yield strips("Relative error of each kind of operator in each decoder layer", grid.layers, rows)
    yield folded("Relative errors in figures", _error_table(grid))


def _error_table(grid: ErrorGrid) -> Html:
    kinds = tuple(grid.errors)
    rows: list[list[Content]] = []
    for number, layer in enumerate(grid.layers):
        rows.append([layer, *(_cell(grid.errors[kind][number]) for kind in kinds)])
    many = any(len(errors) > 1 for layers in grid.errors.values() for errors in layers)
    caption = "Relative error by decoder layer and operator"
    caption += "; of experts mean and largest" if many else ""
    return table(caption, ("layer", *kinds), rows)


def _cell(errors: Sequence[float]) -> str:
    if not errors:
        return "dense"
    if len(errors) == 1:
        return f"{errors[0]:.4f}"
    return f"{statistics.fmean(errors):.4f} to {max(errors):.4f}"


def _layers(layers: Sequence[LayerReport]) -> Iterator[Html]:
    trained = [layer.reconstruction for layer in layers]
    if not any(trained):
        return
    yield element("h3", "What training made of each layer")
    yield element(
        "p",
        "Each decoder layer was trained towards its dense outputs. A bar shows the share of the "
        "layer's error that training left, on windows that it was not trained on; a full bar is "
        "all of it.",
    )
    left = [
        item.error_after / item.error_before if item and item.error_before else None
        for item in trained
    ]
    known = [share for share in left if share is not None]
    row = Strip("error left", tuple(left), f"mean {statistics.fmean(known or [0.0]):.3f}")
    names = [layer.name for layer in layers]
    title = "Share of each decoder layer's error that training left"
    yield strips(title, names, [row], full=1.0)
    cells = [
        (layer.name, f"{item.error_before:.4f}", f"{item.error_after:.4f}", str(item.epochs))
        for layer, item in zip(layers, trained, strict=True)
        if item
    ]
    columns = ("layer", "as pruned", "after training", "passes kept")
    yield folded(
        "Errors of layers in figures",
        table("Error of each layer", columns, cells),
        element(
            "p",
            "The error is relative to what leaves the dense layer. Where the predictions follow "
            "from the last layer alone, its error is that of the predictions, in another unit.",
            class_="note",
        ),
    )
