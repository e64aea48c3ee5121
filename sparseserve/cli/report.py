"""``sparseserve report``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, json_option


@click.command("report", short_help="Write one HTML page about a checkpoint.")
@click.argument("checkpoint", type=LOCAL_PATH)
@click.option("--baseline", type=LOCAL_PATH, help="The dense model, to compare sizes with.")
@click.option(
    "--evaluation",
    "evaluations",
    type=LOCAL_PATH,
    multiple=True,
    metavar="FILE",
    help="What sparseserve evaluate --json printed, of CHECKPOINT or the dense model; repeatable.",
)
@click.option(
    "--bench",
    "benches",
    type=LOCAL_PATH,
    multiple=True,
    metavar="FILE",
    help="What sparseserve bench -o wrote of CHECKPOINT; repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=LOCAL_PATH,
    help="The page; default: CHECKPOINT-report.html in the current folder.",
)
@json_option
def report_command(
    *,
    checkpoint: Path,
    baseline: Path | None,
    evaluations: tuple[Path, ...],
    benches: tuple[Path, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Write one HTML page about CHECKPOINT, in one file that needs no network.

    It shows what was done, the loss by operator and layer, size, what stays dense and why, and how
    to serve it; perplexity, task scores and speed where their results are given. Nothing is run.
    """
    from sparseserve.page.build import PageSources, write_page

    path = output or Path(f"{checkpoint.resolve().name}-report.html")
    size = write_page(
        path,
        PageSources(
            checkpoint=checkpoint, baseline=baseline, evaluations=evaluations, benches=benches
        ),
    )
    if as_json:
        click.echo(json.dumps({"output": str(path), "bytes": size}))
    else:
        click.echo(f"{path}: {size / 1024:,.0f} KiB")
