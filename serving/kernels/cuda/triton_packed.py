"""Products with packed24 tensors as they are stored, by Triton kernels on a GPU.

:class:`TritonKernel` is for small batches, which wait for memory: it reads 9/16 of the bytes of
the dense weight. :class:`TritonVectorKernel` is for the smallest. :class:`TritonUnpackKernel` is
for large ones, which wait for arithmetic: it writes the dense weight once a call and leaves the
product to cuBLAS, so that a layer need not keep a dense copy beside the packed one. Triton comes
with torch for CUDA and is imported on first use.
"""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparseserve.serving.kernels.cuda.device import CudaDevice, cuda_device, refusal
from sparseserve.serving.kernels.cuda.operands import require_operands, require_tensor
from sparseserve.serving.kernels.cuda.tiling import Tiling, batch_tile, split_count
from sparseserve.serving.kernels.cuda.trial import trial_refusal
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight

COLUMN_MULTIPLE = 4
LAYOUT = "packed24"


@dataclass(frozen=True, slots=True)
class _Packed24Kernel(ABC):
    """What the kernels that read packed24 tensors share."""

    layout: ClassVar[str] = LAYOUT
    largest_batch: ClassVar[int | None] = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Return what the device, the layer or a trial run is short of."""
        reason = triton_refusal(spec, cuda_device(spec.device))
        return reason or trial_refusal(self, spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return values ``[rows, columns / 2]`` and indices ``[rows, ceil(columns / 8)]``."""
        packed = weight.packed()
        values = packed.values.to(spec.device, spec.dtype).contiguous()
        return values, packed.indices.to(spec.device).contiguous()

    @abstractmethod
    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply, as every kernel does."""


@dataclass(frozen=True, slots=True)
class TritonKernel(_Packed24Kernel):
    """Decodes the weight in registers and multiplies on dense tensor cores.

    Attributes:
        tile_rows: Output features of a tile.
        tile_columns: Input features read at a time.
        warps: Warps of a program.
        stages: Tiles in flight.
        programs: How many a streaming multiprocessor should have.
    """

    tile_rows: int = 64
    tile_columns: int = 128
    warps: int = 4
    stages: int = 4
    programs: int = 2

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return the product.

        Raises:
            ValueError: The operands do not fit.
        """
        from sparseserve.serving.kernels.cuda.triton_launch import multiply

        values, indices = packed
        _require(values, indices, inputs, bias, rows)
        return multiply(values, indices, inputs, bias, self.tiling(inputs, rows))

    def tiling(self, inputs: Tensor, rows: int) -> Tiling:
        """Return how the product with ``inputs`` is cut on their device."""
        batch, columns = inputs.shape
        tile = Tiling(
            batch=self.tile_batch(batch),
            rows=self.tile_rows,
            columns=self.tile_columns,
            warps=self.warps,
            stages=self.stages,
            programs=self.programs,
        )
        device = cuda_device(inputs.device)
        splits = split_count(
            batch, rows, columns, tile=tile, processors=device.processors if device else 1
        )
        return replace(tile, splits=splits)

    def tile_batch(self, batch: int) -> int:
        """Return how many inputs a tile takes."""
        return batch_tile(batch)


@dataclass(frozen=True, slots=True)
class TritonVectorKernel(TritonKernel):
    """Picks the inputs of each group by its code and multiplies without tensor cores.

    A pruned place is not multiplied, so an infinite input there leaves no NaN.
    """

    # Every input of a batch reads the weight anew, from the cache at best.
    largest_batch: ClassVar[int | None] = 4

    tile_rows: int = 4
    tile_columns: int = 1024
    stages: int = 1
    programs: int = 4

    def tile_batch(self, batch: int) -> int:
        """Return 1: a tile is of one input."""
        return 1


@dataclass(frozen=True, slots=True)
class TritonUnpackKernel(_Packed24Kernel):
    """Writes the dense weight, then multiplies densely."""

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return the product.

        Raises:
            ValueError: The operands do not fit.
        """
        from sparseserve.serving.kernels.cuda.triton_launch import unpack

        values, indices = packed
        _require(values, indices, inputs, bias, rows)
        return linear(inputs, unpack(values, indices), bias)


def triton_refusal(spec: LinearSpec, device: CudaDevice | None) -> str | None:
    """Return why the Triton kernels cannot run ``spec`` on ``device``, or None if they should."""
    if device is not None and not _has_triton():
        return "needs Triton, which is not installed: pip install triton"
    return refusal(spec, device, row_multiple=1, column_multiple=COLUMN_MULTIPLE)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _require(
    values: Tensor, indices: Tensor, inputs: Tensor, bias: Tensor | None, rows: int
) -> None:
    columns, device = inputs.shape[-1], inputs.device
    require_tensor("values", values, (rows, columns // 2), inputs.dtype, device)
    require_tensor("indices", indices, (rows, -(-columns // 8)), torch.uint8, device)
    require_operands(inputs, bias, rows=rows, columns=columns, weight=values)
