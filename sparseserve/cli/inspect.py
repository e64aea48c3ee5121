"""``sparseserve inspect``."""

from __future__ import annotations

import json

import click

from sparseserve.cli.options import json_option


@click.command("inspect", short_help="Show what a checkpoint holds.")
@click.argument("source")
@json_option
def inspect_command(source: str, as_json: bool) -> None:
    """Show what SOURCE holds: a checkpoint folder, a safetensors file, or a name on the hub.

    For every matrix: its zeros, the pattern they make, the sparse kernels that take its shape, and
    the tensor-parallel degrees that can cut it, by outputs and by inputs.
    """
    from dataclasses import asdict

    from sparseserve.cli.console import print_inspection
    from sparseserve.errors import ArtifactError
    from sparseserve.models.model_folder import find_model_folder
    from sparseserve.paths import local_path
    from sparseserve.workflow.inspection import inspect_checkpoint

    path = local_path(source, "checkpoint", ArtifactError)
    found = inspect_checkpoint(path if path.exists() else find_model_folder(source))
    if as_json:
        click.echo(json.dumps({**asdict(found), "path": source}))
    else:
        print_inspection(found)
