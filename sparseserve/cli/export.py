"""``sparseserve export``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, dtype_option, format_option, json_option


@click.command("export", short_help="Write a pruned checkpoint again in another format.")
@click.argument("checkpoint", type=LOCAL_PATH)
@click.option("-o", "--output", type=LOCAL_PATH, required=True, help="New folder.")
@format_option("How to store it.", required=True)
@dtype_option("Round all weights to it; auto keeps theirs.")
@json_option
def export_command(
    *, checkpoint: Path, output: Path, export_format: str, dtype: str, as_json: bool
) -> None:
    """Write a pruned CHECKPOINT again in another format."""
    from sparseserve.devices import DTYPES
    from sparseserve.workflow.run import export

    artifact = export(checkpoint, output, export_format, DTYPES.get(dtype))
    size = artifact.weight_bytes
    if as_json:
        facts = {"output": str(output), "format": export_format, "weight_bytes": size}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{output}: {export_format}, {size / 2**20:,.1f} MiB of weights")
