"""Which shapes of a 2:4 weight each kernel takes: no device is asked, no library loaded."""

from __future__ import annotations

from sparseserve.serving.kernels.cuda import cusparselt, cutlass, triton_packed
from sparseserve.sparsity import TWO_FOUR

#: By kernel, what output and input features must be multiples of.
SHAPE_LIMITS = {
    "cpu": (1, TWO_FOUR.column_multiple),
    "triton": (1, triton_packed.COLUMN_MULTIPLE),
    "cusparselt": (cusparselt.ROW_MULTIPLE, cusparselt.COLUMN_MULTIPLE),
    "cutlass": (cutlass.ROW_MULTIPLE, cutlass.COLUMN_MULTIPLE),
}
