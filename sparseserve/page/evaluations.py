"""What ``sparseserve evaluate --json`` found, of this checkpoint, of the dense model and of others.

Two figures stand beside each other only where everything but the model is the same: the text, its
windows, the program and the dtype; or the items of a task and the examples before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparseserve.errors import RecipeError
from sparseserve.page.json_object import JsonObject
from sparseserve.paths import shown

_MADE_BY = "sparseserve evaluate --json"
Side = Literal["dense", "pruned", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of one model.

    Attributes:
        model: As it was named on the command line.
        key: Equal for figures that may be compared.
        subject: The text, or the task and its metric.
        details: Windows, program and dtype; or examples and items.
        value: Perplexity, or score.
        standard_error: Of a score, if it has one.
    """

    model: str
    key: tuple[str, ...]
    subject: str
    details: str
    value: float
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluations:
    """All figures of some files."""

    perplexities: tuple[Figure, ...]
    scores: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Figures that may be compared: of the dense model, of the pruned one, and of others."""

    dense: Figure | None
    pruned: Figure | None
    others: tuple[Figure, ...]

    @property
    def any(self) -> Figure:
        """One of them, for what they have in common."""
        return next(item for item in (self.pruned, self.dense, *self.others) if item)


@dataclass(frozen=True, slots=True)
class Sides:
    """Which names mean the checkpoint, and which the dense model.

    Attributes:
        checkpoint: The folder.
        baseline: The dense model, if it was given.
        source: What the checkpoint was pruned from, as its manifest says.
    """

    checkpoint: Path
    baseline: Path | None
    source: str

    def of(self, model: str) -> Side:
        """Say which of the two a name means.

        Measurements are often made on other machines, so that of a path the last part counts.
        """
        pruned, dense = self.checkpoint, self.baseline or Path(self.source)
        for side, folder in (("pruned", pruned), ("dense", dense)):
            if model == str(folder) or Path(model).absolute() == folder.absolute():
                return side  # type: ignore[return-value]  # mypy widens literals in tuples
        name = Path(model).name
        if name == pruned.resolve().name:
            return "pruned"
        return "dense" if name == dense.name else "other"


def read_evaluations(files: Sequence[Path]) -> Evaluations:
    """Read files of perplexities and of task scores.

    Raises:
        RecipeError: A file is missing, or is nothing that ``evaluate`` writes.
    """
    perplexities: list[Figure] = []
    scores: list[Figure] = []
    for file in files:
        found = JsonObject.read(file, _MADE_BY)
        if "scores" in found:
            scores += _scores(found)
            scores += _scores(found.object("baseline")) if "baseline" in found else ()
        else:
            perplexities.append(_perplexity(found))
    return Evaluations(tuple(perplexities), tuple(scores))


def rows_of(figures: Iterable[Figure], sides: Sides) -> tuple[Row, ...]:
    """Put together what may be compared, in the order of the first figure of each row.

    Raises:
        RecipeError: The dense or the pruned model has two figures of the same thing that differ.
    """
    grouped: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        grouped.setdefault(figure.key, []).append(figure)
    return tuple(_row(group, sides) for group in grouped.values())


def _row(group: list[Figure], sides: Sides) -> Row:
    found: dict[Side, Figure] = {}
    others: list[Figure] = []
    for figure in group:
        side = sides.of(figure.model)
        if side == "other":
            others.append(figure)
            continue
        first = found.setdefault(side, figure)
        if first.value != figure.value:
            raise RecipeError(
                f"--evaluation: {first.value:g} and {figure.value:g} are both given for "
                f"{shown(figure.subject)} of the {side} model ({shown(first.model)} and "
                f"{shown(figure.model)}): leave one out"
            )
    return Row(found.get("dense"), found.get("pruned"), tuple(others))


def _perplexity(found: JsonObject) -> Figure:
    windows, length = found.whole("windows"), found.whole("sequence_length")
    program = f"{found.text('backend')}, {found.text('dtype')}"
    protocol = found.text("protocol") if "protocol" in found else ""
    details = f"{windows:,} windows of {length:,} tokens, {program}"
    hashes = sorted(file.text("sha256") for file in found.objects("files"))
    tokens = str(found.whole("tokens"))
    return Figure(
        model=found.text("model"),
        key=(*hashes, tokens, str(length), program, protocol),
        subject=found.text("text"),
        details=f"{details}, protocol {protocol}" if protocol else details,
        value=found.number("perplexity", above=0),
    )


def _scores(found: JsonObject) -> Iterator[Figure]:
    model, program = found.text("model"), f"{found.text('backend')}, {found.text('dtype')}"
    for score in found.objects("scores"):
        task, metric = score.text("task"), score.text("metric")
        shots = score.whole("shots")
        items = f"{score.whole('items'):,} items, " if "items" in score else ""
        yield Figure(
            model=model,
            key=(task, metric, str(shots), score.text("items_digest"), program),
            subject=f"{task}, {metric}",
            details=f"{items}{shots} examples before each, {program}",
            value=score.number("value"),
            standard_error=score.number("standard_error") if "standard_error" in score else None,
        )
