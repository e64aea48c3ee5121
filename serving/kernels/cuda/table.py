"""All kernels for NVIDIA GPUs by name, with the settings that are worth timing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sparseserve.serving.kernels.cuda.cusparselt import CusparseltKernel
from sparseserve.serving.kernels.cuda.cutlass import CutlassKernel
from sparseserve.serving.kernels.cuda.triton_packed import (
    TritonKernel,
    TritonUnpackKernel,
    TritonVectorKernel,
)
from sparseserve.serving.kernels.protocol import LinearKernel

# Which pairs win is published for A100, RTX 4090 and H100 (SlideSparse, arXiv 2603.05232, its
# search results for bfloat16 2:4): on compute capability 8.x the first four algorithms, split for
# small batches and long sums; on 9.0 a few later ones, some with the library's own cut (-1). What
# a device lacks refuses in its trial run.
_ALGORITHMS = (
    *((algorithm, splits) for algorithm in range(4) for splits in (1, 2, 3, 4, 8)),
    *((algorithm, 1) for algorithm in (10, 12, 15, 17, 20)),
    *((algorithm, -1) for algorithm in (0, 12, 17, 20)),
)


def _cusparselt_name(algorithm: int, splits: int) -> str:
    cut = "" if splits == 1 else "_own_splits" if splits < 0 else f"_{splits}_splits"
    return f"cusparselt_{algorithm}{cut}"


CUDA_KERNELS: Mapping[str, LinearKernel] = MappingProxyType(
    {
        "triton": TritonKernel(),
        "triton_narrow": TritonKernel(tile_rows=32),
        "triton_wide": TritonKernel(tile_rows=128, warps=8, stages=3),
        "triton_vector": TritonVectorKernel(),
        "triton_unpack": TritonUnpackKernel(),
        "cutlass": CutlassKernel(),
        **{
            _cusparselt_name(algorithm, splits): CusparseltKernel(algorithm, splits)
            for algorithm, splits in _ALGORITHMS
        },
    }
)
