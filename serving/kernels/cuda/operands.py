"""What every CUDA product asks of its operands before a library sees them.

torch's own checks of the semi-structured operators are weak: fake tensors of a wrong shape or
dtype trace without complaint, and the device code then reads out of bounds. Nothing here reads
from a device, but :func:`require_two_four`, which is for packing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparseserve.sparsity import TWO_FOUR


def require_operands(
    inputs: Tensor, bias: Tensor | None, *, rows: int, columns: int, weight: Tensor
) -> None:
    """Refuse operands that do not fit a packed ``[rows, columns]`` weight.

    Args:
        inputs: Should be ``[batch, columns]``, contiguous.
        bias: Should be ``[rows]``, contiguous, or None.
        rows: Output features.
        columns: Input features.
        weight: The packed tensor whose dtype and device the others must have.

    Raises:
        ValueError: Names the operand, what it is and what it should be.
    """
    batch = inputs.shape[0] if inputs.ndim else 0
    require_tensor("inputs", inputs, (batch, columns), weight.dtype, weight.device)
    if bias is not None:
        require_tensor("bias", bias, (rows,), weight.dtype, weight.device)


def require_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor of another shape, dtype, layout or device.

    Raises:
        ValueError: Names it, what it is and what it should be.
    """
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name}: {tensor.dtype} {tuple(tensor.shape)}, but the layer takes {dtype} {shape}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} {shape}: not contiguous, strides {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, but the weight is on {device}")


def require_two_four(dense: Tensor, row_multiple: int, column_multiple: int) -> None:
    """Refuse a weight that a sparse format would silently damage.

    Raises:
        ValueError: ``dense`` is not 2:4, not contiguous or not aligned.
    """
    rows, columns = dense.shape
    require_aligned(rows, columns, row_multiple, column_multiple)
    if not dense.is_contiguous():
        raise ValueError(f"weight of strides {dense.stride()}: should be contiguous")
    if violation := TWO_FOUR.first_violation(dense):
        raise ValueError(f"weight is not 2:4 at {violation}")


def require_aligned(rows: int, columns: int, row_multiple: int, column_multiple: int) -> None:
    """Refuse a weight of a size that a kernel cannot hold.

    Raises:
        ValueError: ``rows`` or ``columns`` are no multiples.
    """
    if rows % row_multiple or columns % column_multiple:
        raise ValueError(
            f"weight {rows} x {columns}: should be of multiples of "
            f"{row_multiple} x {column_multiple}"
        )


def pad_batch(inputs: Tensor, multiple: int) -> Tensor:
    """Return ``inputs`` ``[batch, columns]`` with rows of zeros up to a multiple, at least one."""
    missing = -inputs.shape[0] % multiple if inputs.shape[0] else multiple
    return functional.pad(inputs, (0, 0, 0, missing)) if missing else inputs
