"""The options of ``evaluate`` that score a model on tasks, and the table of the scores."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import LOCAL_PATH, Command, collected

if TYPE_CHECKING:
    from rich.table import Table

    from sparseserve.evaluation.evaluate import EvaluationSpec
    from sparseserve.evaluation.task_comparison import TaskDifference
    from sparseserve.evaluation.tasks import TaskReport, TaskScore

_OPTIONS = (
    click.option(
        "--tasks",
        metavar="NAMES",
        help="Score MODEL on tasks of lm-eval instead, such as piqa,openbookqa (extra eval).",
    ),
    click.option(
        "--tasks-from",
        type=LOCAL_PATH,
        metavar="FOLDER",
        help="Local data sets of the tasks, such as piqa.jsonl; default: the hub.",
    ),
    click.option(
        "--baseline", metavar="DENSE", help="With --tasks: score this model, too, and compare."
    ),
    click.option("--limit", type=int, help="With --tasks: items of each; default: all."),
    click.option(
        "--batch-size", type=int, help="With --tasks: answers computed at once.  [default: 8]"
    ),
)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What was given on the command line."""

    tasks: str | None
    tasks_from: Path | None
    baseline: str | None
    limit: int | None
    batch_size: int | None

    def check(self, *, of_text: dict[str, object]) -> None:
        """Refuse options of tasks without tasks, and with tasks those ``of_text``.

        Raises:
            UsageError: Names them.
        """
        own = {
            "--tasks-from": self.tasks_from,
            "--baseline": self.baseline,
            "--limit": self.limit,
            "--batch-size": self.batch_size,
        }
        without = own if self.tasks is None else of_text
        if given := [name for name, value in without.items() if value is not None]:
            reason = "needs --tasks" if self.tasks is None else "does not go with --tasks"
            raise click.UsageError(f"{given[0]} {reason}.")


def task_options(command: Command) -> Command:
    """Add the options to ``command``, which receives them as one keyword ``scoring``."""
    return collected(command, TaskOptions, "scoring", _OPTIONS)


def score(model: str, scoring: TaskOptions, run: EvaluationSpec, *, as_json: bool) -> None:
    """Score ``model``, and the baseline if there is one, and print what was found.

    Args:
        model: What to score.
        scoring: On which tasks.
        run: Backend, dtype, device, and whether to verify the checkpoint.
        as_json: Print JSON instead of a table.
    """
    from rich.console import Console

    from sparseserve.evaluation.task_comparison import compare_scores
    from sparseserve.evaluation.tasks import DEFAULT_BATCH_SIZE, TaskSpec, evaluate_tasks

    spec = TaskSpec(
        tasks=tuple(name.strip() for name in (scoring.tasks or "").split(",") if name.strip()),
        folder=scoring.tasks_from,
        limit=scoring.limit,
        batch_size=DEFAULT_BATCH_SIZE if scoring.batch_size is None else scoring.batch_size,
        backend=run.backend,
        dtype=run.dtype,
        device=run.device,
        verify=run.verify,
    )
    report = evaluate_tasks(model, spec)
    # Only checkpoints of ours can be verified, and the dense model need not be one.
    plain = replace(spec, verify=False)
    dense = evaluate_tasks(scoring.baseline, plain) if scoring.baseline else None
    differences = compare_scores(dense.scores, report.scores) if dense else ()
    if as_json:
        compared = {
            "baseline": _plain(dense),
            "differences": [asdict(each) for each in differences],
        }
        click.echo(json.dumps({**_plain(report), **(compared if dense else {})}))
    else:
        Console(markup=False).print(score_table(report, differences), highlight=False)


def score_table(report: TaskReport, differences: tuple[TaskDifference, ...]) -> Table:
    """Return a line for each score, with one standard error after ``±``."""
    from rich.table import Table

    title = f"{report.harness}; {report.backend}, {report.dtype}; {report.seconds:.0f} s"
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric", "items"):
        table.add_column(name)
    for name in ("dense", "score", "difference", "beyond 2 s.e.") if differences else ("score",):
        table.add_column(name, justify="right")
    for number, each in enumerate(report.scores):
        cells = [_with_error(each.value, each.standard_error)]
        if differences:
            cells = _compared(each, differences[number])
        table.add_row(each.task, each.metric, f"{each.items:,}" if each.items else "", *cells)
    return table


def _compared(score: TaskScore, found: TaskDifference) -> list[str]:
    verdict = {True: "yes", False: "no", None: ""}[found.significant]
    return [
        f"{found.dense:.4f}",
        _with_error(score.value, score.standard_error),
        _with_error(found.difference, found.standard_error, sign="+"),
        verdict,
    ]


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _plain(report: TaskReport | None) -> dict[str, object]:
    """Return a report as JSON takes it, without the value of every item."""
    if report is None:
        return {}
    plain = asdict(report)
    for each in plain["scores"]:
        del each["values"]
    return plain
