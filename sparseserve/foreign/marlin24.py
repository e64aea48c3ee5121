"""``marlin-24`` of compressed-tensors up to 0.14: 2:4 weights in 4 or 8 bits, for a GPU kernel.

Codes lie in the order in which the Sparse-MARLIN kernel (https://arxiv.org/abs/2408.11743) loads
them. The positions are those of CUTLASS, in an order of rows of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24, unpack24
from sparseserve.checkpoint.semi_structured import words_by_row
from sparseserve.errors import ArtifactError

CODES, SCALES, META = "weight_packed", "scale_packed", "meta"
LEAVES = frozenset({CODES, SCALES, META})
_TILE = 16
_ROWS = 64  # in blocks of so many rows the positions change their order
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def dequantized24(codes: Tensor, scales: Tensor, meta: Tensor) -> Tensor:
    """Return the dense weight: code times scale, in float32.

    Args:
        codes: int32 ``[in / 32, out * bits / 2]``.
        scales: float16 ``[groups, out]``; a group is ``in / groups`` inputs.
        meta: int16 ``[in / 32, 2 * out]``.

    Returns:
        float32 ``[out, in]``.

    Raises:
        ArtifactError: They do not belong together.
    """
    bits, rows, columns = _sizes(codes, scales, meta)
    kept = _values(codes, bits, rows, columns)
    # The flat order is CUTLASS's; only the shape was changed.
    turned = words_by_row(meta.contiguous().view(rows, columns // _TILE))
    words = turned.view(-1, 2, 8, 2, 2, turned.shape[1]).permute(0, 2, 4, 1, 3, 5)
    indices = words.reshape(rows, -1).contiguous().view(torch.uint8)
    dense = unpack24(Packed24(kept, indices)).float()
    by_group = dense.view(rows, len(scales), -1) * _scales(scales, columns).T[..., None]
    weight: Tensor = by_group.view(rows, columns)
    return weight


def _sizes(codes: Tensor, scales: Tensor, meta: Tensor) -> tuple[int, int, int]:
    """Return the bits of a code, and output and input features."""
    for name, tensor, dtype in (
        (CODES, codes, torch.int32),
        (SCALES, scales, torch.float16),
        (META, meta, torch.int16),
    ):
        if tensor.ndim != 2 or tensor.dtype != dtype:
            raise ArtifactError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype}")
    rows, columns = scales.shape[1], 2 * _TILE * len(codes)
    bits = next((bits for bits in _INTERLEAVE if codes.shape[1] * 2 == rows * bits), None)
    if bits is None or rows % _ROWS or columns % len(scales):
        raise ArtifactError(
            f"{CODES} {tuple(codes.shape)} and {SCALES} {tuple(scales.shape)} are not those of a "
            f"weight in 4 or 8 bits with a multiple of {_ROWS} output features"
        )
    if tuple(meta.shape) != (columns // (2 * _TILE), 2 * rows):
        raise ArtifactError(
            f"{META} is {tuple(meta.shape)}, not {(columns // (2 * _TILE), 2 * rows)}"
        )
    return bits, rows, columns


def _values(codes: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Return the kept codes int16 ``[out, in / 2]``, zero in the middle."""
    shifts = torch.arange(0, 32, bits)
    parts = (codes.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    tiles = parts.view(-1, 4 * _TILE * _TILE)
    straight = torch.empty_like(tiles)
    straight[:, _tile_order(bits)] = tiles
    by_tile = straight.view(columns // 2 // _TILE, rows // _TILE, _TILE, _TILE)
    by_input = by_tile.transpose(1, 2).reshape(columns // 2, rows)
    values: Tensor = by_input.T - 2 ** (bits - 1)
    return values.to(torch.int16).contiguous()


def _tile_order(bits: int) -> Tensor:
    """Return where each code of four tiles of 16 x 16 comes from."""
    pairs, parity, quad, column, block, half, low = torch.meshgrid(
        *(torch.arange(size) for size in (4, 2, 4, 4, 2, 2, 2)), indexing="ij"
    )
    row = 2 * quad + 8 * half + low
    order = 256 * pairs + _TILE * row + 8 * parity + 4 * block + column
    interleave = list(_INTERLEAVE[bits])
    return order.reshape(-1, len(interleave))[:, interleave].flatten()


def _scales(scales: Tensor, columns: int) -> Tensor:
    """Return the scales float32 ``[groups, out]`` in the order of the outputs."""
    straight: Tensor = scales.float()
    # The writer compares the group with the inputs that are kept, half of all.
    if columns // len(scales) < columns // 2:
        stored = straight.reshape(-1, len(_SCALE_ORDER))
        straight = torch.empty_like(stored)
        straight[:, list(_SCALE_ORDER)] = stored
    return straight.view(len(scales), -1)
