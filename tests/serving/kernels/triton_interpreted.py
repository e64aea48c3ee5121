"""The Triton kernels, run on the CPU by Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so test_triton_kernel.py runs these tests in a
process of their own; pytest does not collect them by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels.cuda.tiling import Tiling
from sparseserve.serving.kernels.cuda.trial import trial_refusal
from sparseserve.serving.kernels.cuda.triton_packed import (
    TritonKernel,
    TritonUnpackKernel,
    TritonVectorKernel,
)
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight, RowBlock
from sparseserve.sparsity import TWO_FOUR

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_kernel.py"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from sparseserve.serving.kernels.cuda.triton_launch import multiply, unpack  # noqa: E402

EXAMPLES = int(os.environ["INTERPRETED_EXAMPLES"])
DTYPES = (torch.float16, torch.bfloat16)
SMALL = Tiling(batch=16, rows=32, columns=64)
Kernel = TritonKernel | TritonUnpackKernel
KERNELS: list[Kernel] = [TritonKernel(), TritonVectorKernel(), TritonUnpackKernel()]


def further(*values: object) -> list[ParameterSet]:
    """Return parameters of cases outside the gate."""
    marks = pytest.mark.further
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        for value in values
    ]


@pytest.fixture(scope="module", autouse=True)
def exact_bfloat16() -> Iterator[None]:
    """Let the interpreter do as cards do with bfloat16.

    It keeps the type as uint16. Its own product multiplies these as integers, and its own casts
    cut what should be rounded and lose denormals.
    """
    builder = interpreter.InterpreterBuilder
    patch = pytest.MonkeyPatch()
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: object, source: object, kind: object) -> object:
        before, after = source.dtype.scalar, kind.scalar  # type: ignore[attr-defined]
        if (before, after) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), tl.float32)  # type: ignore[attr-defined]
        if (before, after) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)  # type: ignore[attr-defined]
        return cast(self, source, kind)

    def create_dot(self: object, a: object, b: object, *rest: object) -> object:
        wide = [
            interpreter.TensorHandle(widen(side.data), tl.float32)  # type: ignore[attr-defined]
            if side.dtype.scalar == tl.bfloat16  # type: ignore[attr-defined]
            else side
            for side in (a, b)
        ]
        return dot(self, *wide, *rest)

    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_dot", create_dot)
    # The builder's class binds the casts by name when it is made; these are the two that matter.
    patch.setattr(builder, "create_fp_ext", cast_impl)
    patch.setattr(builder, "create_fp_trunc", cast_impl)
    yield
    patch.undo()


def widen(data: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrow(data: NDArray[np.float32]) -> NDArray[np.uint16]:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy()


def two_four(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns)).to(dtype)


def spec(weight: Tensor) -> LinearSpec:
    rows, columns = weight.shape
    return LinearSpec(rows, columns, weight.dtype, weight.device, two_four=True)


def assert_within_rounding(
    found: Tensor, weight: Tensor, inputs: Tensor, bias: Tensor | None
) -> None:
    """Bound the error by one rounding of the output and one float32 rounding of each addition."""
    exact = inputs.double() @ weight.double().T
    size = inputs.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    steps = (weight.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
    bound = torch.finfo(found.dtype).eps / 2 * exact.abs() + 1.01 * steps * size
    bound += torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert ((found.double() - exact).abs() <= bound).all()


@given(
    batch=st.integers(1, 20),
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    splits=st.integers(1, 3),
    side=st.sampled_from([1, 8, 16]),
    biased=st.booleans(),
)
@settings(max_examples=EXAMPLES)
def test_any_shape_multiplies_as_the_unpacked_weight_does(
    *,
    batch: int,
    rows: int,
    groups: int,
    dtype: torch.dtype,
    splits: int,
    side: int,
    biased: bool,
) -> None:
    weight, inputs = two_four(rows, 4 * groups, dtype), torch.randn(batch, 4 * groups).to(dtype)
    bias = torch.randn(rows).to(dtype) if biased else None
    packed = pack24(weight)
    tiling = Tiling(side, 32, 64, splits)
    found = multiply(packed.values, packed.indices, inputs, bias, tiling)
    assert found.shape == (batch, rows)
    assert found.dtype is dtype
    assert_within_rounding(found, weight, inputs, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("splits", [2, *further(3, 5)])
def test_shares_of_splits_add_up_with_the_bias_of_each_row(
    splits: int, biased: bool, dtype: torch.dtype
) -> None:
    # More sums than one program adds, and a last split that has less to do.
    weight, inputs = two_four(70, 332, dtype), torch.randn(17, 332).to(dtype)
    bias = 100 * torch.randn(70).to(dtype) if biased else None
    packed = pack24(weight)
    found = multiply(packed.values, packed.indices, inputs, bias, Tiling(16, 32, 32, splits))
    assert_within_rounding(found, weight, inputs, bias)


@pytest.mark.parametrize(
    ("kernel", "batch"),
    [
        (kernel, batch)
        for kernel in KERNELS
        for batch in (1, 2, 4, 8, 16, 32, 64, 100)
        if batch <= (kernel.largest_batch or batch)
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(72, 260), *further((64, 576), (130, 132))])
def test_kernels_give_the_products_of_a_model(
    kernel: Kernel,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    batch: int,
) -> None:
    weight, inputs, bias = two_four(rows, columns, dtype), torch.randn(batch, columns), torch.randn
    packed = kernel.pack(LoadedWeight((RowBlock("a", weight),)), spec(weight))
    offset = bias(rows).to(dtype)
    found = kernel.matmul(packed, inputs.to(dtype), offset, rows)
    assert_within_rounding(found, weight, inputs.to(dtype), offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_trial_before_use_passes(kernel: Kernel, dtype: torch.dtype) -> None:
    spec = LinearSpec(40, 132, dtype, torch.device("cpu"), two_four=True)
    assert trial_refusal(kernel, spec) is None


def test_every_code_of_a_group_is_decoded() -> None:
    # All placements of two values in a group of four, and of one or none, in both half bytes.
    masks = [[i, j] for i in range(4) for j in range(i, 4)]
    weight = torch.zeros(len(masks) + 1, 2 * len(masks) * 4)
    for place, kept in enumerate(masks * 2):
        weight[:-1, [4 * place + position for position in kept]] = 1.0 + place
    weight = weight.to(torch.float16)
    packed = pack24(weight)
    assert torch.equal(unpack(packed.values, packed.indices), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(33, 516), (1, 4), (32, 256), (5, 12)])
def test_unpacking_on_the_device_gives_the_weight_bit_for_bit(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = two_four(rows, columns, dtype)
    packed = pack24(weight)
    assert torch.equal(unpack(packed.values, packed.indices), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_large_terms_that_cancel_leave_the_small_ones(dtype: torch.dtype, splits: int) -> None:
    weight = torch.zeros(4, 128)
    weight[:, 0], weight[:, 5], weight[:, 127] = 4096, -4096, 0.5
    packed, inputs = pack24(weight.to(dtype)), torch.ones(2, 128, dtype=dtype)
    found = multiply(packed.values, packed.indices, inputs, None, Tiling(16, 32, 64, splits))
    assert torch.equal(found, torch.full((2, 4), 0.5, dtype=dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_spread_as_in_the_dense_product(dtype: torch.dtype) -> None:
    weight, inputs = two_four(8, 16, dtype), torch.randn(5, 16).to(dtype)
    weight[weight == 0] = -0.0
    inputs[0, 3], inputs[1, 7], inputs[2, 1] = torch.inf, -torch.inf, torch.nan
    weight[3, weight[3].nonzero()[0]] = torch.inf
    packed = pack24(weight)
    found = multiply(packed.values, packed.indices, inputs, None, SMALL)
    # A pruned place counts as +0.0 in both, and times infinity it is no number.
    expected = (inputs.float() @ weight.float().T).to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormal_weights_are_not_lost(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 8, dtype=dtype)
    weight[:, 2] = torch.finfo(dtype).tiny / 4
    packed = pack24(weight)
    inputs = torch.full((1, 8), 64.0, dtype=dtype)
    found = multiply(packed.values, packed.indices, inputs, None, SMALL)
    assert torch.equal(found, torch.full((1, 2), torch.finfo(dtype).tiny * 16, dtype=dtype))


def test_splits_are_summed_in_the_same_order_every_time() -> None:
    weight, inputs = two_four(16, 256, torch.float16), torch.randn(3, 256).half()
    packed, split = pack24(weight), Tiling(16, 32, 64, splits=4)
    first, second = (multiply(packed.values, packed.indices, inputs, None, split) for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_does_not_depend_on_the_rest_of_its_batch() -> None:
    weight, inputs = two_four(40, 64, torch.float16), torch.randn(20, 64).half()
    packed = pack24(weight)
    together = multiply(packed.values, packed.indices, inputs, None, SMALL)
    alone = multiply(packed.values, packed.indices, inputs[17:18], None, SMALL)
    torch.testing.assert_close(together[17:18], alone, rtol=1e-3, atol=1e-5)


def test_one_input_may_begin_inside_a_word() -> None:
    weight, inputs = two_four(8, 16, torch.float16), torch.randn(17).half()[1:].view(1, 16)
    packed = pack24(weight)
    found = multiply(packed.values, packed.indices, inputs, None, Tiling(1, 4, 32))
    assert_within_rounding(found, weight, inputs, None)


def test_an_empty_batch_gives_an_empty_result() -> None:
    packed = pack24(two_four(8, 16, torch.float16))
    inputs = torch.empty(0, 16, dtype=torch.float16)
    assert multiply(packed.values, packed.indices, inputs, None, SMALL).shape == (0, 8)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_wrong_operand_is_refused_before_the_kernel_sees_it(
    kernel: Kernel,
) -> None:
    weight = two_four(8, 16, torch.float16)
    values, indices = kernel.pack(LoadedWeight((RowBlock("a", weight),)), spec(weight))
    inputs, bias = torch.randn(2, 16).half(), torch.randn(8).half()
    for packed, given_inputs, given_bias, name in [
        ((values, indices), inputs.float(), bias, "values"),
        ((values, indices), torch.randn(2, 24).half(), bias, "values"),
        ((values, indices[:, :1].contiguous()), inputs, bias, "indices"),
        ((values, indices.to(torch.int16)), inputs, bias, "indices"),
        ((values, indices), torch.randn(16, 2).half().T, bias, "inputs"),
        ((values, indices), inputs, bias[:4], "bias"),
        ((values, indices), inputs, bias.float(), "bias"),
    ]:
        with pytest.raises(ValueError, match=name):
            kernel.matmul(packed, given_inputs, given_bias, 8)
