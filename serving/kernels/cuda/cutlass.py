"""Products on the sparse tensor cores of compute capability 8.x through torch's CUTLASS kernels.

The operators ``torch._sparse_semi_structured_mm(packed, metadata, dense)`` and ``_addmm`` multiply
the 2:4 ``[rows, columns]`` matrix from the left. They have one tile size, made for large batches,
and give the result transposed, which costs a copy: where cuSPARSELt runs it is likely to be the
better of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24
from sparseserve.checkpoint.semi_structured import to_meta
from sparseserve.serving.kernels.cuda.device import CudaDevice, cuda_device, refusal
from sparseserve.serving.kernels.cuda.operands import (
    pad_batch,
    require_aligned,
    require_operands,
    require_tensor,
)
from sparseserve.serving.kernels.cuda.trial import trial_refusal
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight

# Limits of 16-bit types in torch's SparseSemiStructuredTensorCUTLASS.
ROW_MULTIPLE = 32
COLUMN_MULTIPLE = 64
BATCH_MULTIPLE = 8
# A metadata word holds the positions of four groups of four.
COLUMNS_PER_WORD = 16


@dataclass(frozen=True, slots=True)
class CutlassKernel:
    """torch's own 2:4 kernel for Ampere and Ada."""

    layout: ClassVar[str] = "cutlass"
    largest_batch: ClassVar[int | None] = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Return what the device, the layer or a trial run is short of."""
        reason = cutlass_refusal(spec, cuda_device(spec.device))
        return reason or trial_refusal(self, spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return values ``[rows, columns / 2]`` and int16 metadata ``[rows, columns / 16]``.

        The metadata is in the order in which CUTLASS reads it, not row by row. Both are made from
        the packed weight, without a dense copy.

        Raises:
            ServingError: The weight is not 2:4.
            ValueError: It is not aligned.
        """
        packed = weight.packed()
        values = packed.values.to(spec.device, spec.dtype).contiguous()
        rows, kept = values.shape
        require_aligned(rows, 2 * kept, ROW_MULTIPLE, COLUMN_MULTIPLE)
        metadata = to_meta(Packed24(values, packed.indices.to(spec.device)))
        return values, metadata.contiguous()

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return the product, transposed into place by a copy.

        Raises:
            ValueError: The operands do not fit.
        """
        values, metadata = packed
        batch, columns = inputs.shape
        words, device = columns // COLUMNS_PER_WORD, inputs.device
        require_tensor("values", values, (rows, columns // 2), inputs.dtype, device)
        require_tensor("metadata", metadata, (rows, words), torch.int16, device)
        require_operands(inputs, bias, rows=rows, columns=columns, weight=values)
        right = pad_batch(inputs, BATCH_MULTIPLE).t()
        if bias is None:
            product = torch._sparse_semi_structured_mm(values, metadata, right)
        else:
            product = torch._sparse_semi_structured_addmm(bias, values, metadata, right)
        return product.t()[:batch].contiguous()


def cutlass_refusal(spec: LinearSpec, device: CudaDevice | None) -> str | None:
    """Return why the CUTLASS kernels cannot run ``spec`` on ``device``, or None if they should."""
    if device is not None and device.capability[0] != 8:
        return f"torch's CUTLASS kernels are for compute capability 8.x, not {device}"
    return refusal(spec, device, row_multiple=ROW_MULTIPLE, column_multiple=COLUMN_MULTIPLE)
