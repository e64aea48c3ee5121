"""The options of ``prune-and-export`` that set a budget: which operators stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import Command, collected

if TYPE_CHECKING:
    from sparseserve.budget.report import BudgetReport, Goal
    from sparseserve.checkpoint.artifact import Artifact
    from sparseserve.workflow.job import Job

validation_option = click.option(
    "--validation",
    multiple=True,
    metavar="TEXT",
    help="Text to measure losses on; given several times, a budget holds on each. Default: what "
    "calibration leaves of its text.",
)
_OPTIONS = (
    click.option(
        "--max-perplexity-increase",
        metavar="SHARE",
        help="Leave dense what it takes to lose no more than this, such as 10%.",
    ),
    click.option(
        "--keep-dense-fraction",
        metavar="SHARE",
        help="Leave this share of the weights dense, where it helps most, such as 20%.",
    ),
    validation_option,
)


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """What was given on the command line."""

    max_perplexity_increase: str | None
    keep_dense_fraction: str | None
    validation: tuple[str, ...]

    @property
    def given(self) -> bool:
        """Whether there is a budget."""
        return (self.max_perplexity_increase, self.keep_dense_fraction) != (None, None)

    def check(self, *, dry_run: bool) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: Names them.
        """
        wanted = {
            "--max-perplexity-increase": self.max_perplexity_increase is not None,
            "--keep-dense-fraction": self.keep_dense_fraction is not None,
            "--dry-run": dry_run,
        }
        names = [name for name, is_given in wanted.items() if is_given]
        if self.given and len(names) > 1:
            raise click.UsageError(f"{' and '.join(names)} do not go together: give one of them.")
        if self.validation and not self.given:
            raise click.UsageError(
                "--validation goes with --max-perplexity-increase or --keep-dense-fraction."
            )


def budget_options(command: Command) -> Command:
    """Add the options to ``command``, which receives them as one keyword ``budget``."""
    return collected(command, BudgetOptions, "budget", _OPTIONS)


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


def prune_to_budget(
    job: Job, output: Path, options: BudgetOptions
) -> tuple[Artifact, BudgetReport]:
    """Prune as much as ``options`` allow.

    Raises:
        SparseServeError: It cannot be done.
    """
    from sparseserve.budget.price_run import HeldOutSpec
    from sparseserve.budget.within_budget import prune_within_budget

    held_out = HeldOutSpec(texts=options.validation)
    return prune_within_budget(job, output, _goal(options), held_out=held_out)


def _goal(options: BudgetOptions) -> Goal:
    from sparseserve.budget.report import KeepDenseFraction, MaxPerplexityIncrease

    if options.max_perplexity_increase is not None:
        name = "--max-perplexity-increase"
        return MaxPerplexityIncrease(parse_share(name, options.max_perplexity_increase))
    assert options.keep_dense_fraction is not None
    return KeepDenseFraction(parse_share("--keep-dense-fraction", options.keep_dense_fraction))


def print_budget(report: BudgetReport) -> None:
    """Print what was left dense and what it cost."""
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
