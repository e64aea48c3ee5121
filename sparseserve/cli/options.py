"""Options that several commands take, and the JSON that they ask for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sparseserve.checkpoint.formats import FORMATS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
AnyCommand = TypeVar("AnyCommand", bound=Callable[..., object])


class _LocalPath(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A path that can be looked up, whether something is there or not."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from sparseserve.errors import ArtifactError
        from sparseserve.paths import local_path

        return local_path(value, param.human_readable_name if param else "path", ArtifactError)


LOCAL_PATH = _LocalPath()
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
json_file_option = click.option("-o", "--output", type=LOCAL_PATH, help="Also write the JSON here.")
text_column_option = click.option(
    "--text-column",
    metavar="NAME",
    help="Column of a table or dataset to read; default: text, or messages for chats.",
)
verify_option = click.option(
    "--verify", is_flag=True, help="First verify the checkpoint: hashes, pattern, every tensor."
)


def say_whether_verified(checkpoint: Path, verified: bool) -> None:
    """Tell on standard error what was checked of a ``checkpoint`` of ours, and how to check all."""
    from sparseserve.checkpoint.artifact import MANIFEST_FILE

    if verified:
        click.echo(f"{checkpoint}: verified", err=True)
    elif (checkpoint / MANIFEST_FILE).exists():
        click.echo(
            f"{checkpoint}: names and sizes of its files are right; --verify also compares their "
            "hashes and checks every tensor",
            err=True,
        )


device_option = click.option(
    "--device", help="Where to run: cpu or cuda; default: cuda if there is one."
)


def collected(
    command: Command,
    kind: type[DataclassInstance],
    keyword: str,
    options: Sequence[Callable[[Command], Command]],
) -> Command:
    """Add ``options`` to ``command``, which receives their values as one ``kind``.

    Args:
        command: What to add them to.
        kind: A dataclass with a field for every option.
        keyword: The name under which the command takes it.
        options: Click's decorators, in the order in which ``--help`` lists them.
    """

    @functools.wraps(command)
    def with_one_value(**values: Any) -> None:
        own = {item.name: values.pop(item.name) for item in fields(kind) if item.name in values}
        command(**{keyword: kind(**own)}, **values)

    added: Command = with_one_value
    for option in reversed(options):
        added = option(added)
    return added


def format_option(meaning: str, *, required: bool = False) -> Callable[[AnyCommand], AnyCommand]:
    """Return ``--format``, which takes the name of any format there is."""
    return click.option(
        "--format",
        "export_format",
        type=click.Choice(list(FORMATS)),
        required=required,
        help=meaning,
    )


def dtype_option(meaning: str) -> Callable[[AnyCommand], AnyCommand]:
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

    That another process is filling it is told here, before the libraries that take seconds to load.

    Raises:
        click.UsageError: It was not given.
        ArtifactError: Another process is working there.
    """
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from sparseserve.checkpoint.run_folder import refuse_busy

    refuse_busy(output)
    return output


def check_json_file(output: Path | None) -> None:
    """Refuse an ``--output`` that cannot be written; what fills it may take hours to measure.

    Raises:
        ArtifactError: Names it, and says why.
    """
    if output is None:
        return
    from sparseserve.checkpoint.output_place import refuse_inside_checkpoint
    from sparseserve.checkpoint.tensors import partial_of, writing
    from sparseserve.errors import ArtifactError

    if not output.parent.is_dir():
        raise ArtifactError(
            f"-o {output}: there is no folder {output.parent}: make it or choose another file"
        )
    if output.exists() and not output.is_file():
        raise ArtifactError(f"-o {output}: is a folder or no plain file: choose another file")
    refuse_inside_checkpoint(output)
    with writing(output, remedy="make room or choose another file"):
        partial_of(output).touch()
        partial_of(output).unlink()


def print_json(data: dict[str, object], *, as_json: bool) -> None:
    """Print ``data`` in one line, if ``--json`` asks for it."""
    if as_json:
        click.echo(json.dumps(data))


def write_json_file(data: dict[str, object], *, as_json: bool, output: Path | None) -> None:
    """Write ``data`` to ``--output``, last of all: what was measured is on the screen by then.

    Raises:
        ArtifactError: It cannot be written; standard output then has the JSON all the same.
    """
    if output is None:
        return
    from sparseserve.checkpoint.tensors import write_json
    from sparseserve.errors import ArtifactError

    try:
        write_json(output, data, remedy="standard output has the same JSON: save it from there")
    except ArtifactError:
        print_json(data, as_json=not as_json)
        raise
