"""Rounding kept weights with errors repaired, against the algorithm as it is published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.checkpoint.quantization import Quantization, rounded, scales_of
from sparseserve.checkpoint.quantized24 import quantized24
from sparseserve.pruners.quantize import QuantizeKept
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.solvers.problem import damped_gram
from sparseserve.solvers.statistics import InputStatistics, relative_output_error
from sparseserve.sparsity import TWO_FOUR
from tests.unit.checkpoint.test_quantization import ROUNDING


@pytest.fixture(params=ROUNDING)
def how(request: pytest.FixtureRequest) -> Quantization:
    return Quantization(to=request.param)


def pruned(case: Any) -> Tensor:
    return SparseGPT().prune(case.weight, case.statistics, TWO_FOUR).weight


def gptq(weight: Tensor, gram: Tensor, scales: Tensor, how: Quantization) -> Tensor:
    """Frantar et al. 2023, equations 2 and 3, column by column, with a fixed mask."""
    weight, mask = weight.double().clone(), weight != 0
    inverse = torch.linalg.inv(gram.double())
    for column in range(weight.shape[1]):
        before = weight[:, column].clone()
        code = rounded(before[:, None].float(), scales, how)[:, 0].double()
        weight[:, column] = code * mask[:, column]
        error = (before - weight[:, column]) / inverse[column, column]
        rest = slice(column + 1, None)
        weight[:, rest] -= torch.outer(error, inverse[column, rest])
        gone = torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse = inverse - gone
    return weight.float()


@pytest.mark.parametrize("columns", [24, 160, 320])
def test_it_is_gptq_with_a_mask(make_case: Any, columns: int) -> None:
    case = make_case(corrected=False, rows=8, columns=columns)
    how = Quantization(to="fp8")  # whose scales are not searched
    start = pruned(case)
    found = QuantizeKept(how).prune(start, case.statistics, TWO_FOUR)
    assert found.scales is not None
    expected = gptq(start, damped_gram(case.statistics, 0.01), scales_of(start, how), how)
    # The two sum in another order, so a value near the middle may fall to the other side.
    same = (found.weight - expected).abs() <= 1e-4 * expected.abs()
    assert float(same.float().mean()) > 0.98


def test_pruned_places_stay_zero_and_all_others_are_codes(
    make_case: Any, how: Quantization
) -> None:
    case = make_case(corrected=True, rows=12, columns=192)
    start = pruned(case)
    found = QuantizeKept(how).prune(start, case.statistics, TWO_FOUR)
    assert not found.weight[start == 0].any()
    assert found.scales is not None
    stored = quantized24(found.weight, how, found.scales)
    assert stored.dequantized().values.isfinite().all()


def test_repairing_errors_loses_less_than_rounding_to_the_nearest(
    make_case: Any, how: Quantization
) -> None:
    case = make_case(corrected=False, rows=32, columns=128)
    start = pruned(case)
    nearest = rounded(start, scales_of(start, how), how)
    found = QuantizeKept(how).prune(start, case.statistics, TWO_FOUR).weight
    repaired, plain = (
        relative_output_error(weight, start, case.statistics) for weight in (found, nearest)
    )
    assert repaired < 0.97 * plain


def test_inputs_that_do_not_depend_on_one_another_leave_nothing_to_repair() -> None:
    torch.manual_seed(0)
    start = TWO_FOUR.project(torch.randn(8, 160))
    gram = torch.diag(torch.rand(160) + 0.5).double()
    how = Quantization(to="fp8")
    found = QuantizeKept(how).prune(start, InputStatistics(gram, gram, gram, 400), TWO_FOUR)
    assert torch.equal(found.weight, rounded(start, scales_of(start, how), how))


def test_rows_may_be_rounded_together_or_alone(make_case: Any, how: Quantization) -> None:
    case = make_case(corrected=False, rows=16, columns=96)
    start = pruned(case)
    whole = QuantizeKept(how).prune(start, case.statistics, TWO_FOUR).weight
    part = QuantizeKept(how).prune(start[:5], case.statistics, TWO_FOUR).weight
    assert float((whole[:5] == part).float().mean()) > 0.98
