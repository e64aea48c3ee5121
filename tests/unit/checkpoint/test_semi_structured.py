"""Torch's semi-structured form: both ways against torch's own conversions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparseserve.checkpoint import semi_structured
from sparseserve.checkpoint.packed24 import pack24, unpack24
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR

DTYPES = [torch.float16, torch.bfloat16, torch.int8]
SHAPES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}


def two_four(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight with two non-zeros in every group."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randint(1, 100, (rows, columns), generator=generator).float()
    mask = TWO_FOUR.best_mask(torch.rand(rows, columns, generator=generator))
    return (weight * mask).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("times", [(1, 1), (2, 3), (6, 9)])
def test_values_and_meta_are_those_of_torch(dtype: torch.dtype, times: tuple[int, int]) -> None:
    rows, columns = (size * factor for size, factor in zip(SHAPES[dtype], times, strict=True))
    weight = two_four(rows, columns, dtype)
    packed = pack24(weight)
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)  # type: ignore[no-untyped-call]
    assert packed.values.equal(values)
    assert semi_structured.to_meta(packed).equal(meta)
    assert unpack24(semi_structured.from_meta(values, meta)).equal(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_decodes_groups_with_fewer_non_zeros_to_the_same_weight(dtype: torch.dtype) -> None:
    groups = [group for group in product((0, 3), repeat=4) if sum(map(bool, group)) <= 2]
    assert len(groups) == 11
    rows, columns = SHAPES[dtype]
    flat = [value for index in range(rows * columns // 4) for value in groups[index % 11]]
    weight = torch.tensor(flat).view(rows, columns).to(dtype)
    packed = pack24(weight)
    meta = semi_structured.to_meta(packed)
    dense = sparse_semi_structured_to_dense_cutlass(packed.values, meta)  # type: ignore[no-untyped-call]
    assert dense.equal(weight)
    assert unpack24(semi_structured.from_meta(packed.values, meta)).equal(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(31, 64), (32, 60), (33, 64), (16, 128)])
def test_what_torchs_limits_exclude_is_stored_dense(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = two_four(*shape, dtype)
    assert semi_structured.stored(weight).keys() == {"weight"}
    assert semi_structured.stored(weight)["weight"].equal(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_limits_are_those_of_torchs_class(dtype: torch.dtype) -> None:
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    assert (rows, columns) == SHAPES[dtype]
    assert semi_structured.fits(torch.zeros(rows, columns, dtype=dtype))
    assert not semi_structured.fits(torch.zeros(rows // 2, columns, dtype=dtype))
    assert not semi_structured.fits(torch.zeros(rows, columns // 2, dtype=dtype))


def test_float32_is_refused_with_what_can_be_done() -> None:
    with pytest.raises(ArtifactError, match=r"no torch\.float32: use --dtype bfloat16"):
        semi_structured.stored(two_four(32, 64, torch.float32))
    assert semi_structured.kept_dtype(torch.float32) == torch.bfloat16
    assert semi_structured.kept_dtype(torch.float16) == torch.float16


@pytest.mark.parametrize(
    "meta",
    [
        torch.zeros(32, 4, dtype=torch.int32),
        torch.zeros(32, 8, dtype=torch.int16),
        torch.zeros(16, 4, dtype=torch.int16),
        torch.zeros(32, 4, dtype=torch.int16),  # positions that do not ascend
    ],
    ids=["dtype", "columns", "rows", "positions"],
)
def test_meta_that_does_not_belong_to_the_values_is_refused(meta: torch.Tensor) -> None:
    values = torch.ones(32, 32, dtype=torch.bfloat16)
    with pytest.raises(ArtifactError):
        unpack24(semi_structured.from_meta(values, meta))
