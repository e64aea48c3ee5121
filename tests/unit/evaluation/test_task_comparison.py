"""Differences of scores are told from chance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sparseserve.errors import RecipeError
from sparseserve.evaluation.task_comparison import compare_scores
from sparseserve.evaluation.tasks import TaskScore


def scores_of(answers: list[float], **changes: Any) -> list[TaskScore]:
    mean = sum(answers) / len(answers)
    score = TaskScore(
        task="own",
        version="1",
        shots=0,
        metric="acc",
        value=mean,
        standard_error=math.sqrt(mean * (1 - mean) / (len(answers) - 1)),
        items=len(answers),
        items_digest="same",
        values=tuple(answers),
    )
    return [replace(score, **changes)]


def test_ten_lost_of_a_hundred_are_a_loss_only_where_the_items_can_be_paired() -> None:
    dense = scores_of([1.0] * 60 + [0.0] * 40)
    pruned = scores_of([1.0] * 50 + [0.0] * 50)
    (paired,) = compare_scores(dense, pruned)
    assert paired.standard_error == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    assert paired.significant
    (unpaired,) = compare_scores(dense, scores_of([1.0] * 50 + [0.0] * 50, values=()))
    assert unpaired.standard_error == pytest.approx(math.sqrt((0.24 + 0.25) / 99))
    assert not unpaired.paired
    assert not unpaired.significant


def test_equal_answers_are_no_difference_and_no_error_gives_no_verdict() -> None:
    dense = scores_of([1.0, 0.0, 1.0])
    (same,) = compare_scores(dense, dense)
    assert (same.difference, same.standard_error, same.significant) == (0.0, 0.0, False)
    bare = scores_of([1.0, 0.0, 1.0], values=(), standard_error=None)
    (unknown,) = compare_scores(dense, bare)
    assert (unknown.standard_error, unknown.significant) == (None, None)


def test_models_that_were_asked_other_items_are_not_compared() -> None:
    dense = scores_of([1.0, 0.0])
    with pytest.raises(RecipeError, match="own, acc: the two models were not asked the same items"):
        compare_scores(dense, scores_of([1.0, 0.0], items_digest="else"))
