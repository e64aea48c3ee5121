"""Foreign formats, read from tensors made here; the fixtures hold what other programs wrote."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import ArtifactError
from sparseserve.foreign import bitmask24, marlin24
from sparseserve.sparsity import TWO_FOUR

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep two places of each group, which may hold zeros, and write one bit for each place."""
    rows, columns = weight.shape
    kept = TWO_FOUR.best_mask((weight.float() != 0).to(torch.uint8))
    values = torch.stack([row[mask] for row, mask in zip(weight, kept, strict=True)])
    mask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for place in range(columns):
        mask[:, place // 8] |= kept[:, place].to(torch.uint8) << (place % 8)
    return values, mask, torch.tensor([[rows], [columns]])


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), groups=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_bitmask_gives_back_the_weight_bit_for_bit(
    dtype: torch.dtype, rows: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = TWO_FOUR.project(torch.randn(rows, 4 * groups, generator=generator) * 20).to(dtype)
    found = bitmask24.dense24(*compress(weight))
    assert found.dtype == dtype
    assert found.view(torch.uint8).equal(weight.view(torch.uint8))


def test_a_bitmask_keeps_negative_zeros_and_nan_as_they_are() -> None:
    values = torch.tensor([[-0.0, torch.nan]], dtype=torch.float16)
    mask, shape = torch.tensor([[0b0011]], dtype=torch.uint8), torch.tensor([1, 4])
    found = bitmask24.dense24(values, mask, shape)
    assert found.view(torch.int16).tolist() == [[-32768, 0x7E00, 0, 0]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v, m, s: (v, m ^ 1, s), "keeps 1 of the four places of row 0, group 0|keeps 3"),
        (lambda v, m, s: (v[:, 1:], m, s), "compressed .* are not half of 3 x 16"),
        (lambda v, m, s: (v, m[:, 1:], s), r"bitmask is torch\.uint8 \(3, 1\), not"),
        (lambda v, m, s: (v, m.short(), s), r"bitmask is torch\.int16"),
        (lambda v, m, s: (v, m, s[:1]), r"shape is \[\[3\]\], not the two sizes"),
        (lambda v, m, s: (v, m, s * 2), "are not half of 6 x 32"),
    ],
)
def test_a_bitmask_that_does_not_fit_is_refused(
    change: Callable[..., tuple[torch.Tensor, ...]], reason: str
) -> None:
    weight = TWO_FOUR.project(torch.randn(3, 16))
    with pytest.raises(ArtifactError, match=reason):
        bitmask24.dense24(*change(*compress(weight)))


def test_bits_beyond_the_row_are_refused() -> None:
    values, mask, shape = compress(torch.ones(1, 4) * torch.tensor([1.0, 1, 0, 0]))
    with pytest.raises(ArtifactError, match="beyond the 4 of a row"):
        bitmask24.dense24(values, mask | 0b110000, shape)


def packed_like(rows: int, columns: int, bits: int, groups: int = 1) -> list[torch.Tensor]:
    codes = torch.zeros(columns // 32, rows * bits // 2, dtype=torch.int32)
    scales = torch.ones(groups, rows, dtype=torch.float16)
    meta = torch.zeros(columns // 32, 2 * rows, dtype=torch.int16)
    return [codes, scales, meta]


@pytest.mark.parametrize(
    ("part", "tensor", "reason"),
    [
        (0, torch.zeros(2, 7, dtype=torch.int32), "not those of a weight in 4 or 8 bits"),
        (0, torch.zeros(2, 128), r"weight_packed is torch\.float32"),
        (1, torch.ones(3, 64, dtype=torch.float16), "scale_packed"),
        (1, torch.ones(1, 64), r"scale_packed is torch\.float32"),
        (2, torch.zeros(2, 64, dtype=torch.int16), r"meta is \(2, 64\), not \(2, 128\)"),
        (2, torch.zeros(2, 128, dtype=torch.int32), r"meta is torch\.int32"),
        (2, torch.zeros(2, 128, dtype=torch.int16), "do not ascend"),
    ],
)
def test_marlin_tensors_that_do_not_fit_are_refused(
    part: int, tensor: torch.Tensor, reason: str
) -> None:
    tensors = packed_like(64, 64, 4)
    tensors[part] = tensor
    with pytest.raises(ArtifactError, match=reason):
        marlin24.dequantized24(*tensors)
