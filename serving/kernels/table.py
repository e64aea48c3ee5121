"""All kernels by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparseserve.serving.kernels.cpu.bf16_kernels import (
    CpuBf16,
    CpuBf16Dense,
    CpuBf16Tiles,
)
from sparseserve.serving.kernels.cpu.int8_kernels import CpuInt8
from sparseserve.serving.kernels.cpu.kernels import (
    CpuDense,
    CpuDirect,
    CpuUnpacked,
    CpuUnpackedMatmul,
)
from sparseserve.serving.kernels.cuda.table import CUDA_KERNELS
from sparseserve.serving.kernels.dense import DenseKernel
from sparseserve.serving.kernels.protocol import LinearKernel

DENSE, CPU_INT8 = "dense", "cpu_int8"
CPU_DENSE, CPU_BF16_DENSE = "cpu_dense", "cpu_bf16_dense"
KERNELS: Mapping[str, LinearKernel] = MappingProxyType(
    {
        "cpu_direct": CpuDirect(),
        "cpu_unpacked": CpuUnpacked(),
        "cpu_unpacked_matmul": CpuUnpackedMatmul(),
        "cpu_bf16": CpuBf16(),
        "cpu_bf16_tiles": CpuBf16Tiles(),
        CPU_DENSE: CpuDense(),
        CPU_BF16_DENSE: CpuBf16Dense(),
        CPU_INT8: CpuInt8(),
        **CUDA_KERNELS,
        DENSE: DenseKernel(),
    }
)
