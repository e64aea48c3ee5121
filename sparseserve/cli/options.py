"""Options that several commands take, and the JSON that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
json_file_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Also write the JSON here."
)
text_column_option = click.option(
    "--text-column",
    metavar="NAME",
    help="Column of a table or dataset to read; default: text, or messages for chats.",
)


def dtype_option(meaning: str) -> Callable[[Command], Command]:
    """Return ``--dtype``; ``meaning`` says what is computed in it, and what auto stands for."""
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help=meaning,
    )


def required_output(output: Path | None) -> Path:
    """Return ``output``, which a command needs in some of its uses only.

    Raises:
        click.UsageError: It was not given.
    """
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    return output


def give_json(data: dict[str, object], *, as_json: bool, output: Path | None) -> None:
    """Write ``data`` to ``output`` and print it, as ``--output`` and ``--json`` ask."""
    from sparseserve.checkpoint.tensors import write_json

    if output:
        write_json(output, data)
    if as_json:
        click.echo(json.dumps(data))
