"""The option ``--text NAME=SOURCE`` that benchmarks share: which texts a model is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence

import click

PACKAGED = "packaged"
DEFAULT = (f"speeches={PACKAGED}",)
HELP = f"Evaluation text NAME=SOURCE, may be repeated; default: {DEFAULT[0]}."


def named_texts(values: Sequence[str]) -> dict[str, str | None]:
    """Return the source of each name; None is the text of the package, called ``packaged``.

    Raises:
        click.BadParameter: A value is not NAME=SOURCE, or a name comes twice.
    """
    texts: dict[str, str | None] = {}
    for value in values or DEFAULT:
        name, _, source = value.partition("=")
        if not name or not source:
            raise click.BadParameter(
                f"'{value}' is not NAME=SOURCE: give a name and a file, a dataset or '{PACKAGED}'"
            )
        if name in texts:
            raise click.BadParameter(f"'{name}' names two texts: give each a name of its own")
        texts[name] = None if source == PACKAGED else source
    return texts


text_option = click.option(
    "--text",
    "texts",
    multiple=True,
    callback=lambda context, parameter, values: named_texts(values),
    help=HELP,
)
