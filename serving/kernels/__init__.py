"""Kernels that multiply by 2:4 weights, and the choice among them.

``protocol`` is the seam; each kernel has a file of its own and a line in ``table``. While a layer
is loaded, ``choice`` times the kernels that can run it (``timing``, ``timing_cache``), makes a
``plan`` and packs the weight; ``operation`` is the torch operator that carries the plan out.
"""

from sparseserve.serving.kernels.choice.choose import LayerKernels, layer_kernels, with_dense
from sparseserve.serving.kernels.choice.plan import BATCHES, KernelPlan, KernelTimes
from sparseserve.serving.kernels.operation import two_four_linear
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.table import DENSE, KERNELS

__all__ = [
    "BATCHES",
    "DENSE",
    "KERNELS",
    "KernelPlan",
    "KernelTimes",
    "LayerKernels",
    "LinearKernel",
    "LinearSpec",
    "LoadedWeight",
    "RowBlock",
    "layer_kernels",
    "two_four_linear",
    "with_dense",
]
