from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.budget.report import KeepDenseFraction, MaxPerplexityIncrease, Round, TextIncrease
from sparseserve.budget.search import AIM, Trial, next_prediction
from sparseserve.cli.budget import parse_share
from sparseserve.errors import RecipeError


@given(st.floats(0.01, 2), st.floats(0.2, 5), st.floats(1, 2))
def test_a_few_rounds_come_close_to_the_budget(budget: float, factor: float, power: float) -> None:
    """Whatever the truth is that rises with the prediction."""
    trials: list[Trial] = []
    while len(trials) < 8 and (wanted := next_prediction(trials, budget)) is not None:
        assert wanted > 0
        assert all(wanted != trial.predicted for trial in trials)
        trials.append(Trial(wanted, factor * wanted**power))
    best = max(trial.measured for trial in trials if trial.measured <= budget)
    assert best >= 0.9 * AIM * budget


def test_a_guess_lies_between_what_fits_and_what_does_not() -> None:
    trials = [Trial(1.0, 0.5), Trial(2.0, 3.0)]
    wanted = next_prediction(trials, 1.0)
    assert wanted is not None
    assert 1.0 < wanted < 2.0
    assert wanted == pytest.approx(1 + (AIM - 0.5) / 2.5)


def test_the_search_ends_when_the_budget_is_used_up() -> None:
    assert next_prediction([Trial(1.0, 0.98)], 1.0) is None


def test_an_increase_carries_its_spread_over_the_windows() -> None:
    found = TextIncrease.of("t", [1.0, 2.0, 3.0], [1.1, 2.2, 3.3])
    assert found.increase == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.bound == pytest.approx(0.2 + 0.2 / math.sqrt(3))
    assert found.perplexity / found.dense_perplexity == pytest.approx(math.exp(0.2))


def test_a_round_is_judged_by_its_worst_text_and_survives_json() -> None:
    texts = tuple(TextIncrease.of(str(n), [1.0, 1.0], [1.0 + n, 1.0 + n]) for n in (1, 3, 2))
    found = Round(dense_operators=("a",), sparse_share=0.5, predicted=1.0, measured=texts)
    assert found.bound == 3.0
    assert Round.from_json(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("text", "value"), [("10%", 0.1), ("0.1", 0.1), ("150%", 1.5), ("0", 0.0), ("2.5%", 0.025)]
)
def test_shares_are_read_as_percentages_or_fractions(text: str, value: float) -> None:
    assert parse_share("--x", text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["-1%", "-0.1", "ten", "", "%", "nan", "inf", "10%%", "1e999%"])
def test_what_is_no_share_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--x '.*' is not a share: write 10% or 0.1"):
        parse_share("--x", text)


@pytest.mark.parametrize("text", ["1", "10", "1.0"])
def test_a_number_that_may_be_a_percentage_must_say_so(text: str) -> None:
    with pytest.raises(RecipeError, match="percent sign"):
        parse_share("--x", text)


def test_goals_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="--max-perplexity-increase 0 must be above 0"):
        MaxPerplexityIncrease(0.0)
    with pytest.raises(RecipeError, match="--keep-dense-fraction 1 must be"):
        KeepDenseFraction(1.0)
