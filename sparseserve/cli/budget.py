"""The options of ``prune-and-export`` that choose which operators stay dense."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import required_output

if TYPE_CHECKING:
    from sparseserve.budget.prices import UnitSensitivity
    from sparseserve.budget.report import DialReport, Goal
    from sparseserve.checkpoint.artifact import Artifact, Format
    from sparseserve.recipe.settings import PruneRecipe

Command = Callable[..., None]


@dataclass(frozen=True, slots=True)
class DialOptions:
    """What was given on the command line."""

    max_perplexity_increase: str | None
    keep_dense_fraction: str | None
    sensitivity: bool
    validation: tuple[str, ...]

    @property
    def given(self) -> bool:
        """Whether the dial, or its measurements alone, are asked for."""
        one = self.max_perplexity_increase, self.keep_dense_fraction
        return self.sensitivity or one != (None, None)

    def check(self, *, dry_run: bool) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: Names them.
        """
        wanted = {
            "--max-perplexity-increase": self.max_perplexity_increase is not None,
            "--keep-dense-fraction": self.keep_dense_fraction is not None,
            "--sensitivity": self.sensitivity,
            "--dry-run": dry_run,
        }
        names = [name for name, is_given in wanted.items() if is_given]
        if self.given and len(names) > 1:
            raise click.UsageError(f"{' and '.join(names)} do not go together: give one of them.")
        if self.validation and not self.given:
            raise click.UsageError(
                "--validation goes with --max-perplexity-increase, --keep-dense-fraction or "
                "--sensitivity."
            )


def dial_options(command: Command) -> Command:
    """Add the options to ``command``, which receives them as one keyword ``dial``."""

    @click.option(
        "--max-perplexity-increase",
        metavar="SHARE",
        help="Leave dense what it takes to lose no more than this, such as 10%.",
    )
    @click.option(
        "--keep-dense-fraction",
        metavar="SHARE",
        help="Leave this share of the weights dense, where it helps most, such as 20%.",
    )
    @click.option(
        "--sensitivity",
        is_flag=True,
        help="Only measure what pruning each operator costs; print, plot and write it.",
    )
    @click.option(
        "--validation",
        multiple=True,
        metavar="TEXT",
        help="Text to measure losses on; several are all kept within the budget. Default: what "
        "calibration leaves of its text.",
    )
    @functools.wraps(command)
    def with_dial(
        *,
        max_perplexity_increase: str | None,
        keep_dense_fraction: str | None,
        sensitivity: bool,
        validation: tuple[str, ...],
        **others: object,
    ) -> None:
        options = DialOptions(max_perplexity_increase, keep_dense_fraction, sensitivity, validation)
        command(dial=options, **others)

    return with_dial


def parse_share(option: str, text: str) -> float:
    """Read ``10%`` or ``0.1``; a number from 1 on must say that it is a percentage.

    Raises:
        RecipeError: It is neither.
    """
    from sparseserve.errors import RecipeError

    number, percent, rest = text.partition("%")
    try:
        value = float(number) / 100 if percent else float(number)
    except ValueError:
        value = float("nan")
    if rest or not value >= 0 or value == float("inf"):
        raise RecipeError(f"{option} '{text}' is not a share: write 10% or 0.1")
    if value >= 1 and not percent:
        raise RecipeError(
            f"{option} {text} may mean {text}% or {value:.0%}: write it with the percent sign"
        )
    return value


def run_dial(
    model: str,
    output: Path | None,
    options: DialOptions,
    *,
    recipe: PruneRecipe,
    export_format: Format,
    device: str | None,
    as_json: bool,
) -> None:
    """Carry out what ``options`` ask for.

    Raises:
        SparseServeError: It cannot be done.
    """
    if options.sensitivity:
        folder = output or Path(f"{Path(model).name}-sensitivity")
        _measure(model, folder, options, recipe=recipe, device=device, as_json=as_json)
    else:
        _dial(
            model,
            required_output(output),
            options,
            recipe=recipe,
            export_format=export_format,
            device=device,
            as_json=as_json,
        )


def _dial(
    model: str,
    output: Path,
    options: DialOptions,
    *,
    recipe: PruneRecipe,
    export_format: Format,
    device: str | None,
    as_json: bool,
) -> None:
    from sparseserve.budget.price_run import HeldOutSpec
    from sparseserve.budget.within_budget import dial_and_export
    from sparseserve.cli.console import pruning_progress, show_artifact
    from sparseserve.devices import torch_device

    goal = _goal(options)
    with pruning_progress() as progress:
        artifact, report = dial_and_export(
            model,
            output,
            recipe,
            goal,
            held_out=HeldOutSpec(texts=options.validation),
            export_format=export_format,
            device=torch_device(device),
            progress=progress,
            on_stage=progress.stage,
        )
    show_artifact(artifact, as_json=as_json)
    if not as_json:
        _print_dial(artifact, report)


def _goal(options: DialOptions) -> Goal:
    from sparseserve.budget.report import KeepDenseFraction, MaxPerplexityIncrease

    if options.max_perplexity_increase is not None:
        name = "--max-perplexity-increase"
        return MaxPerplexityIncrease(parse_share(name, options.max_perplexity_increase))
    assert options.keep_dense_fraction is not None
    return KeepDenseFraction(parse_share("--keep-dense-fraction", options.keep_dense_fraction))


def _print_dial(artifact: Artifact, report: DialReport) -> None:
    import math

    from rich.table import Table

    from sparseserve.budget.report import STANDARD_ERRORS
    from sparseserve.cli.console import output_console

    chosen = report.chosen
    table = Table(show_header=False, box=None)
    table.add_row(
        "pruned share",
        f"{chosen.sparse_share:.1%} of {report.prunable_weights:,} prunable weights; "
        f"{len(chosen.dense_operators)} operators stay dense for the budget",
    )
    table.add_row("of the dense size", f"{report.weight_bytes / report.dense_bytes:.1%}")
    for item in chosen.measured:
        table.add_row(
            f"perplexity, {item.text}",
            f"{item.dense_perplexity:.2f} to {item.perplexity:.2f} "
            f"({math.expm1(item.increase):+.1%}, at most {math.expm1(item.bound):+.1%} with "
            f"{STANDARD_ERRORS:g} standard errors)",
        )
    table.add_row("models tried", str(len(report.rounds)))
    output_console().print(table, highlight=False)


def _measure(
    model: str,
    folder: Path,
    options: DialOptions,
    *,
    recipe: PruneRecipe,
    device: str | None,
    as_json: bool,
) -> None:
    from sparseserve.budget.price_run import HeldOutSpec
    from sparseserve.budget.ranking import measure_and_report
    from sparseserve.budget.ranking_plot import require_plotly
    from sparseserve.cli.console import pruning_progress
    from sparseserve.devices import torch_device

    require_plotly()
    with pruning_progress() as progress:
        units = measure_and_report(
            model,
            folder,
            recipe,
            held_out=HeldOutSpec(texts=options.validation),
            device=torch_device(device),
            progress=progress,
            on_stage=progress.stage,
        )
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
