"""The semi_structured format: 2:4 weights as torch's own CUTLASS kernels read them.

A weight is stored as the two parts of ``torch.sparse.SparseSemiStructuredTensorCUTLASS``: its
``packed`` values, which are those of packed24, and its ``meta``, the positions in the order that a
card of compute capability 8.x loads them in. torch can then multiply without pruning or compressing
again. docs/formats.md shows how, without this project.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.packed24 import Packed24, pack24, unpack24
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError

FORMAT = "semi_structured"
VALUES = "weight"
META = "weight_meta"
_GROUPS_PER_BYTE = 2
# By bytes of a value: the words of ``meta``, what rows and columns must be multiples of, and the
# steps in which CUTLASS takes the rows of a block of ``meta``.
_WORD = {1: torch.int32, 2: torch.int16}
_LIMITS = {1: (16, 128), 2: (32, 64)}
_STEPS = {1: (2, 8), 2: (4, 8)}


def fits(weight: Tensor) -> bool:
    """Whether torch can multiply with ``weight`` ``[out, in]`` in this form.

    Raises:
        ArtifactError: Its values are wider than CUTLASS's.
    """
    if weight.dtype.itemsize not in _LIMITS:
        raise ArtifactError(
            f"torch's semi-structured tensors hold no {weight.dtype}: "
            "use --dtype bfloat16 or float16"
        )
    rows, columns = _LIMITS[weight.dtype.itemsize]
    return not (weight.shape[0] % rows or weight.shape[1] % columns)


def to_meta(packed: Packed24) -> Tensor:
    """Return the positions of ``packed`` as CUTLASS reads them.

    The words of a row hold the codes of its groups, the first in the lowest bits, as packed24's
    bytes do. Their order is that of ``reorder_meta`` in CUTLASS's host_reorder.h and of its
    ``ColumnMajorInterleaved<2>``.

    Args:
        packed: A weight ``[out, in]`` whose sizes ``fits`` accepts.

    Returns:
        int16 ``[out, in / 16]`` for 16-bit values, int32 ``[out, in / 32]`` for int8.
    """
    size = packed.values.dtype.itemsize
    words = packed.indices.contiguous().view(_WORD[size])
    rows, columns = words.shape
    step, block = _STEPS[size]
    # Rows of a block change from [step, block] to [block, step] ...
    turned = words.view(rows // (step * block), step, block, columns).transpose(1, 2)
    # ... each square of two rows and two words is transposed, and pairs of columns come first.
    squares = turned.reshape(rows // 2, 2, columns // 2, 2)
    return squares.permute(2, 0, 3, 1).reshape(rows, columns)


def from_meta(values: Tensor, meta: Tensor) -> Packed24:
    """Return the packed weight whose ``to_meta`` is ``meta``.

    Args:
        values: ``[out, in / 2]``.
        meta: ``[out, in / 16]``, or ``[out, in / 32]`` for int8.

    Raises:
        ArtifactError: The two do not belong together.
    """
    size = values.dtype.itemsize
    word = _WORD.get(size)
    rows = values.shape[0]
    per_word = _GROUPS_PER_BYTE * (word.itemsize if word else 1)
    columns = values.shape[-1] // 2 // per_word
    if word is None or meta.dtype != word or tuple(meta.shape) != (rows, columns):
        raise ArtifactError(
            f"values {values.dtype} {tuple(values.shape)} need meta {(rows, columns)}, "
            f"not {meta.dtype} {tuple(meta.shape)}"
        )
    step, block = _STEPS[size]
    squares = words_by_row(meta)
    turned = squares.view(rows // (step * block), block, step, columns).transpose(1, 2)
    return Packed24(values, turned.reshape(rows, columns).contiguous().view(torch.uint8))


def words_by_row(meta: Tensor) -> Tensor:
    """Return the words of ``meta`` ``[out, columns]`` row by row, in CUTLASS's order of rows."""
    rows, columns = meta.shape
    squares = meta.reshape(columns // 2, rows // 2, 2, 2).permute(1, 3, 0, 2)
    return squares.reshape(rows, columns)


def names(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    """Return the names of the stored tensors of ``module``: one where torch's limits exclude it."""
    values, meta = f"{module}.{VALUES}", f"{module}.{META}"
    return (values, meta) if meta in checkpoint else (values,)


def stored(weight: Tensor, *, transposed: bool = False) -> dict[str, Tensor]:
    """Return values and meta of a 2:4 ``weight``, or all of it where torch's limits exclude it.

    Raises:
        ArtifactError: It is not 2:4, or its values are wider than CUTLASS's.
    """
    if not fits(weight):
        return {VALUES: weight.T if transposed else weight}
    packed = pack24(weight)
    return {VALUES: packed.values, META: to_meta(packed)}


def read_weight(checkpoint: Checkpoint, module: str, *, transposed: bool = False) -> Tensor:
    """Read the dense ``[out, in]`` weight of ``module``.

    Raises:
        ArtifactError: A tensor is missing or damaged.
    """
    first, *others = (checkpoint.tensor(name) for name in names(checkpoint, module))
    if others:
        return unpack24(from_meta(first, others[0]))
    return first.T if transposed else first


def check_weight(checkpoint: Checkpoint, module: str, weight: Tensor) -> None:
    """Make sure that ``module`` is stored as ``stored`` would store its dense ``weight``.

    Raises:
        ArtifactError: It is not, to the bit.
    """
    found = [checkpoint.tensor(name) for name in names(checkpoint, module)]
    if fits(weight) != (len(found) > 1):
        raise ArtifactError("is stored dense, though torch's semi-structured tensors can hold it")
    if fits(weight):
        expected = stored(weight).values()
        if any(not _same_bits(one, other) for one, other in zip(found, expected, strict=True)):
            raise ArtifactError("encoding is not the canonical one")


def keeps_stacks() -> bool:
    """Say no: each expert has tensors of its own."""
    return False


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what weights of ``dtype`` are rounded to if nothing else is asked."""
    return dtype if dtype.itemsize in _LIMITS else torch.bfloat16


def quantization_config(modules: Sequence[str], dtype: torch.dtype) -> dict[str, object]:
    """Return what config.json says under ``quantization_config``."""
    return {**packed24.quantization_config(modules, dtype), "format": FORMAT}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))
