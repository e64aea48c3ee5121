"""The second moments against sums over the activations themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import NumericalError
from sparseserve.solvers.statistics import (
    InputStatistics,
    StatisticsSum,
    output_energy,
    output_error,
    relative_output_error,
)

CPU = torch.device("cpu")


def collect(x: torch.Tensor, dense: torch.Tensor, cuts: list[int]) -> InputStatistics:
    total = StatisticsSum(x.shape[1], corrected=True, device=CPU)
    bounds = [0, *sorted(cuts), len(x)]
    for start, stop in itertools.pairwise(bounds):
        total.add(x[start:stop], dense[start:stop])
    return total.finish()


@given(cuts=st.lists(st.integers(0, 50), max_size=5), seed=st.integers(0, 100))
def test_batching_does_not_change_the_second_moments(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, dense = torch.randn(2, 50, 8, generator=generator)
    whole, parts = collect(x, dense, []), collect(x, dense, cuts)
    assert parts.tokens == whole.tokens == 50
    for name in ("gram", "cross", "dense_gram"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.cross.float(), dense.T @ x)


@pytest.mark.parametrize("width", [511, 513, 1100])
def test_wide_second_moments_are_products_of_the_activations_and_symmetric(width: int) -> None:
    x, dense = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(width))
    found = collect(x, dense, [4])
    products = ((found.gram, x, x), (found.cross, dense, x), (found.dense_gram, dense, dense))
    for moment, left, right in products:
        torch.testing.assert_close(moment, left.double().T @ right.double(), rtol=1e-5, atol=1e-5)
    for moment in (found.gram, found.dense_gram):
        assert torch.equal(moment, moment.T)


def test_token_order_does_not_change_the_second_moments(make_case: Any) -> None:
    x = make_case().pruned_inputs
    shuffled = x[torch.randperm(len(x))]
    first, second = (collect(part, part, []).gram for part in (x, shuffled))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_output_error_is_that_of_the_activations(make_case: Any, corrected: bool) -> None:
    case = make_case(corrected=corrected)
    weight = case.weight + 0.1 * torch.randn_like(case.weight)
    error = output_error(weight, case.weight, case.statistics)
    assert float(error.sum()) == pytest.approx(case.error(weight), rel=1e-4)
    energy = case.error(torch.zeros_like(weight))
    assert float(output_energy(case.weight, case.statistics).sum()) == pytest.approx(energy, 1e-4)
    relative = relative_output_error(weight, case.weight, case.statistics)
    assert relative == pytest.approx((case.error(weight) / energy) ** 0.5, rel=1e-4)


def test_scaling_the_inputs_scales_the_error_by_its_square(make_case: Any) -> None:
    case = make_case()
    tripled = InputStatistics.of(3 * case.dense_inputs)
    weight = case.weight * 0.9
    ratio = output_error(weight, case.weight, tripled) / output_error(
        weight, case.weight, case.statistics
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 9.0), rtol=1e-4, atol=0)


def test_the_dense_weight_has_no_error_without_correction(make_case: Any) -> None:
    case = make_case()
    assert float(output_error(case.weight, case.weight, case.statistics).sum()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    inputs = torch.ones(4, 8)
    inputs[2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        InputStatistics.of(inputs)


@pytest.mark.parametrize("corrected", [False, True])
def test_dense_inputs_go_with_corrected_statistics_only(corrected: bool) -> None:
    total = StatisticsSum(8, corrected=corrected, device=CPU)
    given = (torch.ones(1, 8),) if corrected else (torch.ones(1, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match="corrected"):
        total.add(*given)


def test_no_tokens_have_no_second_moments() -> None:
    empty = StatisticsSum(8, corrected=True, device=CPU).finish()
    assert (empty.tokens, empty.corrected) == (0, True)
    assert not any(part.any() for part in (empty.gram, empty.cross, empty.dense_gram))
