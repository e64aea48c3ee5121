"""All kernels by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

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
KERNELS: Mapping[str, LinearKernel] = MappingProxyType(
    {
        "cpu_direct": CpuDirect(),
        "cpu_unpacked": CpuUnpacked(),
        "cpu_unpacked_matmul": CpuUnpackedMatmul(),
        "cpu_dense": CpuDense(),
        CPU_INT8: CpuInt8(),
        **CUDA_KERNELS,
        DENSE: DenseKernel(),
    }
)
