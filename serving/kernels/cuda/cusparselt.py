"""Products on sparse tensor cores through cuSPARSELt, by torch's ``_cslt_*`` operators.

What this adds to torch's ``SparseSemiStructuredTensor`` is the choice of the algorithm and of
split K, on which the gain depends, no copy to transpose the result, and checks. The operators:
``torch._cslt_compress(dense)`` and ``torch._cslt_sparse_mm(compressed, dense_b, ...)``, which
multiplies the 2:4 ``[rows, columns]`` matrix from the left.

There is one kernel for each pair of algorithm and splits, and all share one compressed copy: so
the measured choice among kernels is also the search for the pair, for each shape and batch size,
with its result kept on disk. torch's own search, ``_cslt_sparse_mm_search``, tells the algorithm
but not the splits it found best with.

The compressed form is opaque: it is made on the device that uses it and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.serving.kernels.cuda.device import CudaDevice, cuda_device, refusal
from sparseserve.serving.kernels.cuda.operands import (
    pad_batch,
    require_operands,
    require_tensor,
    require_two_four,
)
from sparseserve.serving.kernels.cuda.trial import trial_refusal
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight

# Limits of 16-bit types: those of cuSPARSELt's documentation of cusparseLtStructuredDescriptorInit
# and of torch's SparseSemiStructuredTensorCUSPARSELT.
ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 16
BATCH_MULTIPLE = 8
# cusparseLtSplitKMode_t: two kernels, which add the parts in a fixed order. One kernel need not.
TWO_KERNELS = 2
# Compressed 16-bit weights take 9/16 of the dense ones.
PACKED_COLUMNS, DENSE_COLUMNS = 9, 16
_OLDEST_ARGUMENT = "split_k_mode"


@dataclass(frozen=True, slots=True)
class CusparseltKernel:
    """One algorithm of cuSPARSELt.

    Attributes:
        algorithm: Its ``alg_id``; what it means depends on the device and the version.
        splits: Parts that the sum over input features is cut into, or -1 for the cut that the
            library makes by itself on compute capability 9.0 and later.
    """

    layout: ClassVar[str] = "cusparselt"
    largest_batch: ClassVar[int | None] = None

    algorithm: int = 0
    splits: int = 1

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Return what the device, torch, the layer or a trial run is short of."""
        reason = cusparselt_refusal(spec, cuda_device(spec.device))
        return reason or trial_refusal(self, spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the compressed weight, ``[rows, 9/16 columns]``.

        Raises:
            ValueError: The weight is not 2:4, which cuSPARSELt would not notice, or not aligned.
        """
        dense = weight.dense().to(spec.device, spec.dtype)
        require_two_four(dense, ROW_MULTIPLE, COLUMN_MULTIPLE)
        # The result is flat. With a row dimension the operator's fake version, too, sees the rows.
        return (torch._cslt_compress(dense).view(spec.rows, -1),)

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return the product, contiguous without a copy.

        Raises:
            ValueError: The operands do not fit.
        """
        (compressed,) = packed
        batch, columns = inputs.shape
        shape = (rows, columns * PACKED_COLUMNS // DENSE_COLUMNS)
        require_tensor("weight", compressed, shape, inputs.dtype, inputs.device)
        require_operands(inputs, bias, rows=rows, columns=columns, weight=compressed)
        product = torch._cslt_sparse_mm(
            compressed,
            pad_batch(inputs, BATCH_MULTIPLE).t(),
            bias=bias,
            transpose_result=True,
            alg_id=self.algorithm,
            split_k=self.splits,
            split_k_mode=TWO_KERNELS if self.splits > 1 else -1,
        )
        return product[:batch]


def cusparselt_refusal(spec: LinearSpec, device: CudaDevice | None) -> str | None:
    """Return why cuSPARSELt cannot run ``spec`` on ``device``, or None if it should."""
    if device is not None and device.cusparselt is None:
        return f"torch {torch.__version__} is built without cuSPARSELt"
    if device is not None and not _takes_splits():
        return f"torch {torch.__version__} is too old: _cslt_sparse_mm has no {_OLDEST_ARGUMENT}"
    return refusal(spec, device, row_multiple=ROW_MULTIPLE, column_multiple=COLUMN_MULTIPLE)


def _takes_splits() -> bool:
    arguments = torch.ops.aten._cslt_sparse_mm.default._schema.arguments
    return any(argument.name == _OLDEST_ARGUMENT for argument in arguments)
