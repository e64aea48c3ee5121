from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.budget.knapsack import Allocation, Frontier, Unit

# Quarters add up exactly, so that plain sums in any order compare as equal.
prices = st.integers(-4, 40).map(lambda quarters: quarters / 4)
few_units = st.lists(st.builds(Unit, st.integers(1, 9), prices), min_size=1, max_size=10)


def every_choice(units: list[Unit]) -> list[tuple[int, float]]:
    """``(weights, price)`` of all subsets."""
    return [
        (sum(unit.weights for unit in chosen), sum(max(unit.price, 0.0) for unit in chosen))
        for size in range(len(units) + 1)
        for chosen in itertools.combinations(units, size)
    ]


def assert_adds_up(found: Allocation, units: list[Unit]) -> None:
    chosen = [units[index] for index in found.pruned]
    assert sorted(set(found.pruned)) == list(found.pruned)
    assert found.weights == sum(unit.weights for unit in chosen)
    assert found.price == sum(max(unit.price, 0.0) for unit in chosen)


@given(few_units, st.integers(0, 120).map(lambda quarters: quarters / 4))
def test_no_choice_within_the_budget_prunes_more(units: list[Unit], budget: float) -> None:
    found = Frontier.of(units).within_price(budget)
    assert_adds_up(found, units)
    assert found.price <= budget
    assert found.weights == max(w for w, price in every_choice(units) if price <= budget)


@given(few_units, st.floats(0, 1))
def test_no_choice_of_as_many_weights_is_cheaper(units: list[Unit], share: float) -> None:
    wanted = share * sum(unit.weights for unit in units)
    found = Frontier.of(units).with_weights(wanted)
    assert_adds_up(found, units)
    assert found.weights >= wanted
    assert found.price == min(price for w, price in every_choice(units) if w >= wanted)


@given(few_units)
def test_the_curve_rises_in_weights_and_in_price(units: list[Unit]) -> None:
    curve = Frontier.of(units).curve()
    for (light, cheap), (heavy, dear) in itertools.pairwise(curve):
        assert light < heavy
        assert cheap < dear
    assert curve[-1][0] == sum(unit.weights for unit in units)


def test_it_beats_taking_units_by_their_price_a_weight() -> None:
    # By the ratio the small unit comes first, and then neither large one fits.
    units = [Unit(2, 1.0), Unit(10, 5.5), Unit(9, 5.0)]
    assert Frontier.of(units).within_price(5.5).pruned == (1,)


def test_a_model_of_320_units_has_a_short_frontier() -> None:
    shapes = (5, 4, 28, 14)  # weights of the four groups of a Llama layer, in their common unit
    units = [
        Unit(shapes[i % 4], 1e-3 * (1.1 + math.sin(i * i)) * shapes[i % 4]) for i in range(320)
    ]
    assert len(Frontier.of(units).curve()) <= 1 + sum(unit.weights for unit in units)


@pytest.mark.parametrize(("weights", "price"), [(0, 1.0), (3, math.nan), (3, math.inf)])
def test_a_unit_without_weights_or_with_no_finite_price_is_refused(
    weights: int, price: float
) -> None:
    with pytest.raises(ValueError, match="nats"):
        Unit(weights, price)


def test_a_negative_budget_and_too_many_weights_are_refused() -> None:
    frontier = Frontier.of([Unit(4, 1.0)])
    with pytest.raises(ValueError, match="negative"):
        frontier.within_price(-0.1)
    with pytest.raises(ValueError, match="more than there are"):
        frontier.with_weights(5)
