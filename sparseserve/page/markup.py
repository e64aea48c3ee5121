"""HTML and SVG from values: text is escaped because it is a ``str``, markup is not."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparseserve.errors import printable

# Elements of HTML that have no end.
_VOID = frozenset({"meta"})


@dataclass(frozen=True, slots=True)
class Html:
    """Markup. Whatever of it came from outside was escaped when it was made."""

    text: str


Content = Html | str


def element(name: str, /, *content: Content, **attributes: str | float) -> Html:
    """Return the element ``name``.

    Args:
        name: Of HTML or SVG.
        content: What is in it; a ``str`` is shown as it is.
        attributes: Their names end in an underscore where Python keeps the word for itself. Other
            underscores stand for hyphens.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_plain(value))}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(content).text}</{name}>")


def joined(content: Iterable[Content]) -> Html:
    """Return ``content`` one after the other."""
    return Html("".join(x.text if isinstance(x, Html) else _escaped(x) for x in content))


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Content]], *, numbers: int = 1
) -> Html:
    """Return a table.

    Args:
        caption: What it shows.
        columns: Their headings.
        rows: Cells; the first of a row names the row.
        numbers: The first column that holds numbers, which stand to the right.
    """
    sides = ["text" if place < numbers else "number" for place in range(len(columns))]
    head = [
        element("th", name, scope="col", class_=side)
        for name, side in zip(columns, sides, strict=True)
    ]
    body = []
    for first, *others in rows:
        cells = [element("th", first, scope="row", class_=sides[0])]
        cells += [
            element("td", cell, class_=side) for cell, side in zip(others, sides[1:], strict=True)
        ]
        body.append(element("tr", *cells))
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return scrolling(caption, whole)


def scrolling(title: str, content: Html) -> Html:
    """Return ``content`` in a box that scrolls sideways where it does not fit."""
    # The keyboard scrolls what it can reach.
    return element("div", content, class_="wide", tabindex=0, role="region", aria_label=title)


def folded(title: str, *content: Content) -> Html:
    """Return ``content`` hidden behind a line that unfolds it."""
    return element("details", element("summary", title), *content)


def _escaped(text: str) -> str:
    # Whatever does not print could turn the order of letters around, or end the file.
    return html.escape("\n".join(printable(line) for line in text.split("\n")))


def _plain(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
