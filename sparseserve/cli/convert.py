"""``sparseserve convert``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, dtype_option, format_option, json_option


@click.command("convert", short_help="Take over a 2:4 checkpoint that another tool made.")
@click.argument("source")
@click.option("-o", "--output", type=LOCAL_PATH, required=True, help="New folder.")
@format_option("How to store it; default: packed24.")
@dtype_option("Round all weights to it; auto keeps theirs.")
@json_option
def convert_command(
    *, source: str, output: Path, export_format: str | None, dtype: str, as_json: bool
) -> None:
    """Write SOURCE, a folder or hub name of a 2:4 checkpoint of another tool, as one of ours.

    Read are dense weights with zeros in place, and two formats of compressed-tensors that no
    current release of it opens: sparse-24-bitmask and marlin-24. Codes of 8 bits
    are kept where packed24 can hold them; other quantised weights become floats.
    """
    from sparseserve.devices import DTYPES
    from sparseserve.workflow.convert import convert

    artifact = convert(source, output, export_format or "packed24", DTYPES.get(dtype))
    manifest, told = artifact.manifest, artifact.manifest.report["converted"]
    if as_json:
        facts = {"output": str(output), "format": manifest.format, "pruned": len(manifest.pruned)}
        click.echo(json.dumps({**facts, **told, "weight_bytes": artifact.weight_bytes}))
        return
    click.echo(
        f"{output}: {manifest.format}, {len(manifest.pruned)} 2:4 linears from "
        f"{', '.join(told['formats'])}, {artifact.weight_bytes / 2**20:,.1f} MiB of weights"
    )
    if dense := told["dense_linears"]:
        click.echo(f"{len(dense)} linears are not 2:4 and stay dense, the first is {dense[0]}")
