"""Two kinds of chart as SVG inside of the page; its style sheet gives them their colours.

A chart says nothing that a table beside it does not say in figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparseserve.page.markup import Html, element, scrolling

_WIDTH = 880
_LABEL, _VALUE = 250, 120  # for the words left and right of the bars
_PLOT = _WIDTH - _LABEL - _VALUE
_TALL, _GAP = 30, 10  # of a strip, and between two
_BAR, _BETWEEN, _APART = 16, 3, 14
_LONGEST_LABEL = 34
_MOST_TICKS = 10


@dataclass(frozen=True, slots=True)
class Strip:
    """One upright bar for each decoder layer; None where there is nothing to show."""

    label: str
    values: tuple[float | None, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars that lie, one for each series, with what is said behind each."""

    label: str
    values: tuple[float, ...]
    said: tuple[str, ...]


def strips(
    title: str, layers: Sequence[str], rows: Sequence[Strip], *, full: float | None = None
) -> Html:
    """Draw rows of upright bars, all from zero and to one scale.

    Args:
        title: What the chart shows, for those who cannot see it.
        layers: Names of the decoder layers, first to last.
        rows: With a value, or None, for each layer.
        full: What a bar of full height stands for; None for the largest value.
    """
    values = (v for row in rows for v in row.values if v is not None and math.isfinite(v))
    largest = max(values if full is None else (*values, full), default=0.0) or 1.0
    step = _PLOT / max(len(layers), 1)
    drawn: list[Html] = []
    for number, row in enumerate(rows):
        bottom = _TALL + number * (_TALL + _GAP)
        drawn.append(_words(row.label, _LABEL - 12, bottom - 9, "end"))
        line = {"x1": _LABEL, "x2": _LABEL + _PLOT, "y1": bottom, "y2": bottom}
        drawn.append(element("line", class_="axis", **line))
        drawn += _uprights(row, layers, bottom, step, largest)
        drawn.append(_words(row.said, _LABEL + _PLOT + 12, bottom - 9, "start", "faint"))
    bottom = len(rows) * (_TALL + _GAP) + 8
    drawn += _ticks(len(layers), bottom, step)
    return _chart(title, bottom + 26, drawn)


def lying_bars(
    title: str, series: Sequence[str], rows: Sequence[Bars], *, reference: float | None = None
) -> Html:
    """Draw bars that lie, all from zero and to one scale.

    Args:
        title: What the chart shows, for those who cannot see it.
        series: Names of the bars of a row.
        rows: Each with a value for each series.
        reference: Where a dashed line stands; None is nowhere.
    """
    values = [value for row in rows for value in row.values]
    scale = _PLOT / (max([*values, reference or 0.0]) or 1.0)
    drawn, top = [*_legend(series)], 34 if len(series) > 1 else 8
    start = top
    for row in rows:
        middle = top + (len(series) * (_BAR + _BETWEEN) - _BETWEEN) / 2
        drawn.append(_words(row.label, _LABEL - 12, middle + 5, "end"))
        for number, (value, said) in enumerate(zip(row.values, row.said, strict=True)):
            width = max(value * scale, 1.0)
            drawn.append(
                element(
                    "rect", class_=f"bar{number}", x=_LABEL, y=top, width=width, height=_BAR, rx=2
                )
            )
            drawn.append(_words(said, _LABEL + width + 8, top + _BAR - 3, "start"))
            top += _BAR + _BETWEEN
        top += _APART - _BETWEEN
    if reference is not None:
        place = _LABEL + reference * scale
        drawn.append(
            element("line", class_="reference", x1=place, x2=place, y1=start - 4, y2=top - 8)
        )
    return _chart(title, top, drawn)


def _uprights(
    row: Strip, layers: Sequence[str], bottom: float, step: float, largest: float
) -> Iterator[Html]:
    gap = 1.0 if step > 4 else 0.2
    for number, (layer, value) in enumerate(zip(layers, row.values, strict=True)):
        if value is None or not math.isfinite(value):
            continue
        height = max(value / largest * _TALL, 0.5)
        tip = element("title", f"{layer}, {row.label}: {value:.4f}")
        yield element(
            "rect",
            tip,
            class_="bar0",
            x=_LABEL + number * step + gap / 2,
            y=bottom - height,
            width=min(step, 40.0) - gap,
            height=height,
        )


def _ticks(layers: int, top: float, step: float) -> Iterator[Html]:
    every = next(size for size in (1, 2, 5, 10, 20, 50, 10**9) if layers / size <= _MOST_TICKS)
    yield _words("decoder layer", _LABEL - 12, top + 12, "end", "faint")
    for number in range(0, layers, every):
        middle = _LABEL + number * step + min(step, 40.0) / 2
        yield _words(str(number), middle, top + 12, "middle", "faint")


def _legend(series: Sequence[str]) -> Iterator[Html]:
    if len(series) < 2:
        return
    left = float(_LABEL)
    for number, name in enumerate(series):
        yield element("rect", class_=f"bar{number}", x=left, y=4, width=12, height=12, rx=2)
        yield _words(name, left + 18, 15, "start")
        left += 40 + 7.5 * len(name)


def _words(text: str, x: float, y: float, anchor: str, kind: str = "words") -> Html:
    cut = text if len(text) <= _LONGEST_LABEL else f"…{text[1 - _LONGEST_LABEL :]}"
    return element("text", cut, class_=kind, x=x, y=y, text_anchor=anchor)


def _chart(title: str, height: float, drawn: Sequence[Html]) -> Html:
    drawing = element(
        "svg",
        element("title", title),
        *drawn,
        viewBox=f"0 0 {_WIDTH} {height:.0f}",
        role="img",
        aria_label=title,
    )
    return scrolling(title, drawing)
