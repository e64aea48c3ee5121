"""The second moments against sums over the activations themselves."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import NumericalError
from sparseserve.solvers.statistics import (
    LayerStatistics,
    output_energy,
    output_error,
    relative_output_error,
)

CPU = torch.device("cpu")


def collect(x: torch.Tensor, dense: torch.Tensor, cuts: list[int]) -> LayerStatistics:
    statistics = LayerStatistics.empty(x.shape[1], corrected=True, device=CPU)
    bounds = [0, *sorted(cuts), len(x)]
    for start, stop in itertools.pairwise(bounds):
        statistics = statistics.updated(x[start:stop], dense[start:stop])
    return statistics


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


def test_merging_equals_collecting_together(make_case: Any) -> None:
    case = make_case(corrected=True)
    x, dense = case.pruned_inputs, case.dense_inputs
    parts = [collect(x[i : i + 50], dense[i : i + 50], []) for i in range(0, 200, 50)]
    merged = functools.reduce(LayerStatistics.merged, parts)
    assert merged.tokens == case.statistics.tokens
    torch.testing.assert_close(merged.cross, case.statistics.cross, rtol=1e-5, atol=1e-3)


def test_merging_leaves_its_operands_alone(make_case: Any) -> None:
    statistics = make_case().statistics
    before = statistics.gram.clone()
    merged = statistics.merged(statistics)
    assert torch.equal(statistics.gram, before)
    assert torch.equal(merged.gram, 2 * before)
    assert merged.cross is merged.gram


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
    tripled = LayerStatistics.empty(16, corrected=False, device=CPU).updated(3 * case.dense_inputs)
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
    empty = LayerStatistics.empty(8, corrected=False, device=CPU)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        empty.updated(inputs)


def test_dense_inputs_go_with_corrected_statistics_only() -> None:
    with pytest.raises(ValueError, match="corrected"):
        LayerStatistics.empty(8, corrected=True, device=CPU).updated(torch.ones(1, 8))
