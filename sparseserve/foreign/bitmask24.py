"""``sparse-24-bitmask`` of compressed-tensors up to 0.14: kept values, and a bit for each place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR

VALUES, MASK, SHAPE = "compressed", "bitmask", "shape"
LEAVES = frozenset({VALUES, MASK, SHAPE})
_BITS = 8


def dense24(values: Tensor, mask: Tensor, shape: Tensor) -> Tensor:
    """Return the dense weight, bit for bit, with zeros at the places that are not kept.

    Args:
        values: ``[out, in / 2]``, of any dtype: the kept places of each row, from left to right.
        mask: uint8 ``[out, ceil(in / 8)]``; a bit for each place, the first in the lowest.
        shape: int64 ``[2, 1]`` or ``[2]``: out and in.

    Returns:
        ``[out, in]`` in the dtype of ``values``.

    Raises:
        ArtifactError: They do not belong together, or a group does not keep two places.
    """
    if shape.numel() != 2 or shape.is_floating_point():
        raise ArtifactError(f"{SHAPE} is {shape.tolist()}, not the two sizes of a matrix")
    rows, columns = (int(size) for size in shape.flatten())
    expected = (rows, -(-columns // _BITS))
    if columns % 4 or tuple(values.shape) != (rows, columns // 2):
        raise ArtifactError(
            f"{VALUES} {tuple(values.shape)} are not half of {rows} x {columns}, in groups of four"
        )
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise ArtifactError(
            f"{MASK} is {mask.dtype} {tuple(mask.shape)}, not torch.uint8 {expected}"
        )
    bits = mask[..., None] >> torch.arange(_BITS, dtype=torch.uint8) & 1
    kept = bits.reshape(rows, -1).bool()
    if bool(kept[:, columns:].any()):
        raise ArtifactError(f"{MASK} keeps places beyond the {columns} of a row")
    kept = kept[:, :columns]
    counts = TWO_FOUR.nonzeros(kept)
    if bool((counts != 2).any()):
        row, group = (counts != 2).nonzero()[0].tolist()
        raise ArtifactError(
            f"{MASK} keeps {int(counts[row, group])} of the four places of row {row}, group "
            f"{group}, not two"
        )
    # By bytes: a conversion would change the sign of zeros, and NaN, and not all dtypes are masked.
    size = values.dtype.itemsize
    flat = values.contiguous().view(torch.uint8).view(-1, size)
    dense = torch.zeros(rows * columns, size, dtype=torch.uint8)
    dense[kept.flatten()] = flat
    return dense.view(values.dtype).view(rows, columns)
