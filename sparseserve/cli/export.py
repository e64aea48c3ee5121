"""``sparseserve export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import (
    LOCAL_PATH,
    Command,
    collected,
    dtype_option,
    format_option,
    json_option,
)
from sparseserve.errors import RecipeError

if TYPE_CHECKING:
    from sparseserve.exporters.tensorrt import TensorRTSettings


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options that ``--format tensorrt`` alone has; None where they were not given."""

    via: str | None
    max_batch: int | None
    max_new: int | None
    max_past: int | None
    require_sparse: bool | None

    def settings(self, export_format: str) -> TensorRTSettings | None:
        """Return them as the exporter takes them; None for other formats.

        Raises:
            RecipeError: One was given with another format.
        """
        given = {
            name: value
            for name in ("via", "max_batch", "max_new", "max_past", "require_sparse")
            if (value := getattr(self, name)) is not None
        }
        if export_format != "tensorrt":
            for name in given:
                raise RecipeError(
                    f"--{name.replace('_', '-')} is for --format tensorrt, not {export_format}"
                )
            return None
        from sparseserve.exporters.tensorrt import TensorRTSettings

        return TensorRTSettings(**given)


_ENGINE_OPTIONS = (
    click.option(
        "--via",
        type=click.Choice(["onnx", "torch-tensorrt"]),
        help="tensorrt: what builds the engine; default: onnx.",
    ),
    click.option("--max-batch", type=int, help="tensorrt: sequences at once; default: 4."),
    click.option("--max-new", type=int, help="tensorrt: tokens of a prompt; default: 512."),
    click.option("--max-past", type=int, help="tensorrt: tokens kept before them; default: 2048."),
    click.option(
        "--require-sparse/--no-require-sparse",
        default=None,
        help="tensorrt: fail if the engine has no sparse tactic.",
    ),
)


def engine_options(command: Command) -> Command:
    """Add the options, which ``command`` receives as one value ``engine``."""
    return collected(command, EngineOptions, "engine", _ENGINE_OPTIONS)


@click.command("export", short_help="Write a pruned checkpoint again in another format.")
@click.argument("checkpoint", type=LOCAL_PATH)
@click.option("-o", "--output", type=LOCAL_PATH, required=True, help="New folder.")
@format_option("How to store it.", required=True)
@dtype_option("Round all weights to it; auto keeps theirs, where the format can.")
@click.option(
    "--quantize",
    help="Round kept weights to int8, fp8 or int4, each to the nearest; none takes it back. "
    "Default: as they are. prune-and-export --quantize loses less.",
)
@click.option(
    "--group-size", type=int, help="int4: inputs that share a scale: 128, 64 or 32; default 64."
)
@engine_options
@json_option
def export_command(
    *,
    checkpoint: Path,
    output: Path,
    export_format: str,
    dtype: str,
    quantize: str | None,
    group_size: int | None,
    as_json: bool,
    engine: EngineOptions,
) -> None:
    """Write a pruned CHECKPOINT again in another format."""
    from sparseserve.checkpoint.quantization import Quantization
    from sparseserve.cli.console import tell_of_engine
    from sparseserve.devices import DTYPES
    from sparseserve.workflow.run import export

    settings = engine.settings(export_format)
    if group_size is not None and quantize is None:
        raise RecipeError("--group-size is for --quantize int4: give that, too")
    artifact = export(
        checkpoint,
        output,
        export_format,
        DTYPES.get(dtype),
        tensorrt=settings,
        quantization=Quantization(to=quantize, group_size=group_size) if quantize else None,
    )
    size = artifact.weight_bytes
    if as_json:
        facts = {"output": str(output), "format": export_format, "weight_bytes": size}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{output}: {export_format}, {size / 2**20:,.1f} MiB of weights")
    tell_of_engine(artifact)
