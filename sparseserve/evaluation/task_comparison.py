"""Whether a pruned model scores worse than its dense one, or only other than it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sparseserve.errors import RecipeError
from sparseserve.evaluation.tasks import TaskScore

SIGNIFICANT = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDifference:
    """A pruned model's score beside the dense one's.

    Attributes:
        task: Its name.
        metric: Its name.
        dense: The dense model's score.
        pruned: The pruned model's score.
        difference: ``pruned - dense``.
        standard_error: Of the difference; None where a score has none.
        paired: Whether it is that of the differences item by item, which leaves out how much
            harder one item is than another, and so is smaller; else of two independent samples.
        significant: Whether the difference is more than SIGNIFICANT standard errors; None where
            there is no standard error.
    """

    task: str
    metric: str
    dense: float
    pruned: float
    difference: float
    standard_error: float | None
    paired: bool
    significant: bool | None


def compare_scores(
    dense: Sequence[TaskScore], pruned: Sequence[TaskScore]
) -> tuple[TaskDifference, ...]:
    """Compare two models that were asked the same items.

    Args:
        dense: Scores of one, as :func:`~sparseserve.evaluation.tasks.evaluate_tasks` gives them.
        pruned: Scores of the other; there is a difference for each.

    Raises:
        RecipeError: They were not.
    """
    before = {(score.task, score.metric): score for score in dense}
    differences = []
    for score in pruned:
        base = before.get((score.task, score.metric))
        if base is None or base.items_digest != score.items_digest or base.shots != score.shots:
            raise RecipeError(
                f"{score.task}, {score.metric}: the two models were not asked the same items: give "
                "both the same --tasks, --limit and data"
            )
        differences.append(_difference(base, score))
    return tuple(differences)


def _difference(dense: TaskScore, pruned: TaskScore) -> TaskDifference:
    difference = pruned.value - dense.value
    paired = len(dense.values) == len(pruned.values) > 1
    error = _paired_error(dense, pruned) if paired else _unpaired_error(dense, pruned)
    return TaskDifference(
        task=pruned.task,
        metric=pruned.metric,
        dense=dense.value,
        pruned=pruned.value,
        difference=difference,
        standard_error=error,
        paired=paired,
        significant=None if error is None else abs(difference) > SIGNIFICANT * error,
    )


def _paired_error(dense: TaskScore, pruned: TaskScore) -> float:
    pairs = zip(dense.values, pruned.values, strict=True)
    changes = [after - before for before, after in pairs]
    return statistics.stdev(changes) / math.sqrt(len(changes))


def _unpaired_error(dense: TaskScore, pruned: TaskScore) -> float | None:
    if dense.standard_error is None or pruned.standard_error is None:
        return None
    return math.hypot(dense.standard_error, pruned.standard_error)
