"""``sparseserve verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, json_option


@click.command("verify", short_help="Check that a checkpoint is whole and as it was written.")
@click.argument("checkpoint", type=LOCAL_PATH)
@json_option
def verify_command(checkpoint: Path, as_json: bool) -> None:
    """Check hashes, pattern, dtypes and finiteness of CHECKPOINT; exit 0 if all is right."""
    from rich.console import Console
    from rich.text import Text

    from sparseserve.checkpoint.verification import verify

    with Console(stderr=True).status("verifying") as status:
        artifact = verify(
            checkpoint,
            # Not a str, in which brackets would be markup.
            on_file=lambda name: status.update(Text(f"verifying {name}")),
        )
    manifest = artifact.manifest
    if as_json:
        facts = {"path": str(checkpoint), "format": manifest.format, "pattern": manifest.pattern}
        click.echo(json.dumps({**facts, "pruned": len(manifest.pruned), "ok": True}))
    else:
        click.echo(
            f"{checkpoint}: {len(manifest.files)} files and {len(manifest.pruned)} "
            f"{manifest.pattern} operators ({manifest.format}) are whole"
        )
