"""``sparseserve prune-and-export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.budget import BudgetOptions, budget_options, print_budget, prune_to_budget
from sparseserve.cli.engine_options import EngineOptions, engine_options
from sparseserve.cli.options import (
    LOCAL_PATH,
    device_option,
    format_option,
    json_option,
    required_output,
)
from sparseserve.cli.recipe_options import RecipeOptions, recipe_options

if TYPE_CHECKING:
    from sparseserve.workflow.job import Job


@click.command("prune-and-export", short_help="Prune a model and write the checkpoint.")
@click.argument("model")
@click.option("-o", "--output", type=LOCAL_PATH, help="New folder to write.")
@recipe_options
@format_option("How to store the result; default: packed24 for 2:4, else dense.")
@device_option
@engine_options
@budget_options
@click.option("--dry-run", is_flag=True, help="Rehearse the run and list what it would prune.")
@click.option(
    "--estimate-time",
    is_flag=True,
    help="With --dry-run: prune the first layer, keep nothing of it, and tell how long all of them "
    "would take.",
)
@json_option
def prune_command(
    *,
    model: str,
    output: Path | None,
    recipe: RecipeOptions,
    export_format: str | None,
    device: str | None,
    engine: EngineOptions,
    budget: BudgetOptions,
    dry_run: bool,
    estimate_time: bool,
    as_json: bool,
) -> None:
    """Prune MODEL, a folder or a hub name, and write the checkpoint.

    A run that is interrupted goes on when the same command is given again.
    """
    budget.check(dry_run=dry_run)
    if estimate_time and not dry_run:
        raise click.UsageError(
            "--estimate-time goes with --dry-run: a run shows the time it has left"
        )
    out = None if dry_run else required_output(output)
    # Only now: these load libraries for seconds.
    from sparseserve.cli.console import quiet_libraries
    from sparseserve.devices import torch_device
    from sparseserve.workflow.job import Job

    quiet_libraries()
    job = Job(model, recipe.chosen(), export_format, torch_device(device), engine=engine.chosen())
    if out is None:
        _print_plan(job, output, timed=estimate_time, as_json=as_json)
    else:
        _prune(job, out, budget, as_json)


def _prune(job: Job, out: Path, budget: BudgetOptions, as_json: bool) -> None:
    from dataclasses import replace

    from sparseserve.cli.console import pruning_progress, show_artifact, tell_of_engine
    from sparseserve.workflow.run import prune_and_export

    with pruning_progress() as progress:
        job = replace(job, progress=progress)
        if budget.given:
            artifact, report = prune_to_budget(job, out, budget)
        else:
            artifact, report = prune_and_export(job, out), None
    show_artifact(artifact, as_json=as_json)
    tell_of_engine(artifact)
    if report and not as_json:
        print_budget(report)


def _print_plan(job: Job, output: Path | None, *, timed: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from sparseserve.workflow.run import AS_ASKED, plan

    found = plan(job, output, timed=timed)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for name, (rows, columns) in found.operators:
        click.echo(f"prune  {name}  {rows} x {columns}")
    for name in found.dense_modules:
        click.echo(f"dense  {name}  ({found.dense_reasons.get(name, AS_ASKED)})")
    for line in found.lines:
        click.echo(line)
    if found.seconds is not None:
        click.echo(f"about {_duration(found.seconds)} to prune the layers on this machine")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} seconds"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
