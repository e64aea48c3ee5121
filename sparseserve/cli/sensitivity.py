"""``sparseserve sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.budget import validation_option
from sparseserve.cli.options import LOCAL_PATH, device_option, json_option
from sparseserve.cli.recipe_options import RecipeOptions, text_options

if TYPE_CHECKING:
    from sparseserve.budget.prices import UnitSensitivity


@click.command("sensitivity", short_help="Rank operators by what pruning each costs.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=LOCAL_PATH,
    help="New folder to write; default: MODEL-sensitivity in the current folder.",
)
@text_options
@validation_option
@device_option
@json_option
def sensitivity_command(
    *,
    model: str,
    output: Path | None,
    recipe: RecipeOptions,
    validation: tuple[str, ...],
    device: str | None,
    as_json: bool,
) -> None:
    """Measure what pruning each operator of MODEL costs; print, plot and write it.

    A run that is interrupted goes on when the same command is given again.
    """
    from sparseserve.budget.price_run import HeldOutSpec
    from sparseserve.budget.ranking import measure_and_report
    from sparseserve.budget.ranking_plot import require_plotly
    from sparseserve.cli.console import pruning_progress, quiet_libraries
    from sparseserve.devices import torch_device
    from sparseserve.paths import last_name
    from sparseserve.workflow.job import Job

    quiet_libraries()
    require_plotly()
    folder = output or Path(f"{last_name(model)}-sensitivity")
    with pruning_progress() as progress:
        job = Job(model, recipe.chosen(), device=torch_device(device), progress=progress)
        units = measure_and_report(job, folder, held_out=HeldOutSpec(texts=validation))
    if as_json:
        click.echo((folder / "sensitivity.json").read_text(encoding="utf-8"))
    else:
        _print_ranking(units, folder)


def _print_ranking(units: tuple[UnitSensitivity, ...], folder: Path) -> None:
    from rich.table import Table

    from sparseserve.cli.console import output_console

    table = Table("operators", "weights", "loss increase", "divergence", "a million weights")
    for unit in sorted(units, key=lambda unit: unit.divergence / unit.weights, reverse=True):
        table.add_row(
            unit.label,
            f"{unit.weights:,}",
            f"{unit.loss_increase:+.5f}",
            f"{unit.divergence:.5f}",
            f"{unit.divergence / unit.weights * 1e6:.5f}",
        )
    console = output_console()
    console.print(table, highlight=False)
    console.print(
        "nats a token when pruned alone; the most expensive for their size first, which stay dense "
        f"first. Plot and data: {folder}/sensitivity.html, sensitivity.json",
        highlight=False,
    )
