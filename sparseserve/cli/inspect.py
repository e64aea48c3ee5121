"""``sparseserve inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, json_option


@click.command("inspect", short_help="Show what a checkpoint holds.")
@click.argument("path", type=LOCAL_PATH)
@json_option
def inspect_command(path: Path, as_json: bool) -> None:
    """Show what the checkpoint folder PATH holds: recipe, sizes, sparsity of every matrix."""
    from dataclasses import asdict

    from sparseserve.checkpoint.inspection import inspect_checkpoint
    from sparseserve.cli.console import print_inspection

    found = inspect_checkpoint(path)
    if as_json:
        click.echo(json.dumps({**asdict(found), "path": str(path)}))
    else:
        print_inspection(found)
