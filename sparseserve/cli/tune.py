"""``sparseserve tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import (
    LOCAL_PATH,
    check_json_file,
    dtype_option,
    json_file_option,
    json_option,
    print_json,
    write_json_file,
)

if TYPE_CHECKING:
    from rich.table import Table

    from sparseserve.serving.measure.tuner import TuningReport


@click.command("tune", short_help="Time the kernels of a checkpoint ahead of serving.")
@click.argument("checkpoint", type=LOCAL_PATH)
@dtype_option("To compute in, as the server will; auto is what sparseserve serve takes.")
@click.option(
    "--quantization",
    type=click.Choice(["sparseserve"]),
    help="For a dense checkpoint whose weights are 2:4.",
)
@click.option("--again", is_flag=True, help="Time layers anew that were timed before.")
@json_option
@json_file_option
def tune_command(
    *,
    checkpoint: Path,
    dtype: str,
    quantization: str | None,
    again: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Time the kernels of CHECKPOINT's layers ahead of serving, and show where 2:4 pays."""
    from rich.console import Console

    from sparseserve.cli.console import output_console, quiet_libraries, warn_of_missing_kernels
    from sparseserve.devices import DTYPES
    from sparseserve.serving.launch.requirements import require_vllm
    from sparseserve.serving.measure.tuner import tune

    check_json_file(output)
    quiet_libraries()
    require_vllm("tune")
    warn_of_missing_kernels()
    with Console(stderr=True).status("timing kernels while the model is loaded"):
        found = tune(checkpoint, dtype=DTYPES.get(dtype), quantization=quantization, again=again)
    print_json(found.to_json(), as_json=as_json)
    console = Console(stderr=True, width=200, markup=False) if as_json else output_console()
    console.print(_speedups(found), highlight=False)
    for layers in found.layers:
        console.print(f"{layers.layer}: {layers.plan}", highlight=False)
    write_json_file(found.to_json(), as_json=as_json, output=output)


def _speedups(found: TuningReport) -> Table:
    from rich.table import Table

    batches = tuple(found.speedup)
    table = Table(
        "times the speed of dense at batch", "layers", *map(str, batches), box=None, title_style=""
    )
    for layers in found.layers:
        gains = [f"{layers.speedup(batch):.2f}" for batch in batches if layers.compared]
        table.add_row(layers.layer, str(len(layers.names)), *gains)
    total = sum(len(layers.names) for layers in found.layers)
    gains = [f"{gain:.2f}" for gain in found.speedup.values()]
    table.add_row("together", str(total), *gains, style="bold")
    return table
