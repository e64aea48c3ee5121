"""The product of quantized activations with a 2:4 weight of int8 codes, on a processor.

Every token is quantized by its largest value, sums are integers, and the result is rounded once
(``int8_layout.int8_product`` says it in torch). All vector units, numbers of threads and batch
sizes give the same bits. A token with NaN or infinity becomes NaN, and no other does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.checkpoint.quantization import INT8, LARGEST_CODE
from sparseserve.serving.kernels.cpu.int8_layout import (
    INT8_BLOCK_BYTES,
    INT8_BLOCK_COLUMNS,
    INT8_PANEL_ROWS,
    int8_panels,
)
from sparseserve.serving.kernels.cpu.library import (
    STORED_DTYPES,
    Int8Unit,
    missing_library,
    native_library,
)
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight
from sparseserve.sparsity import TWO_FOUR

# Half of the columns are multiplied, and the sum has to fit 32 bits.
_MOST_COLUMNS = 2 * (torch.iinfo(torch.int32).max // LARGEST_CODE[INT8] ** 2)


def int8_unsupported(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype
) -> str | None:
    """Return why no int8 kernel can run a layer, for the user to read, or None if one can.

    Args:
        device: Where the layer runs.
        rows: Output features on this rank.
        columns: Input features on this rank.
        dtype: Of inputs and outputs.
    """
    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    if dtype not in STORED_DTYPES:
        return f"does not know {dtype}"
    if rows < 1 or columns < 1 or columns % TWO_FOUR.column_multiple:
        return f"{rows} rows of {columns} columns are no groups of {TWO_FOUR.column_multiple}"
    if columns > _MOST_COLUMNS:
        return f"{columns} input features, at most {_MOST_COLUMNS} fit a sum of 32 bits"
    return missing_library()


@dataclass(frozen=True, slots=True)
class CpuInt8:
    """Multiplies integers, straight from packed codes. For any number of tokens.

    Attributes:
        unit: Vector unit; None is the best of the processor.
    """

    layout: ClassVar[str] = "cpu_int8_2of4"
    largest_batch: ClassVar[int | None] = None

    unit: Int8Unit | None = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse layers that are not wholly in int8 codes, and what the library cannot run."""
        if spec.quantized != INT8:
            return "the weight is not int8"
        if not spec.two_four:
            return "a module of the layer is dense"
        return int8_unsupported(spec.device, spec.rows, spec.columns, spec.dtype)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the panels, uint8, and the scale of every row, float32 ``[rows]``."""
        codes, scale = weight.codes()
        return int8_panels(codes), scale.contiguous()

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Quantize the inputs and multiply.

        Raises:
            ValueError: Operands do not belong together.
        """
        panels, scale = packed
        _check(panels, scale, inputs, bias, rows=rows)
        given = inputs.dtype
        if given is torch.float16 or not inputs.is_contiguous():
            inputs = (inputs.float() if given is torch.float16 else inputs).contiguous()
        if bias is not None and (bias.dtype is not inputs.dtype or not bias.is_contiguous()):
            bias = bias.to(inputs.dtype).contiguous()
        product = inputs.new_empty(len(inputs), rows)
        native_library().run_int8(panels, scale, inputs, bias, product, unit=self.unit)
        return product if product.dtype is given else product.to(given)


def _check(
    panels: Tensor, scale: Tensor, inputs: Tensor, bias: Tensor | None, *, rows: int
) -> None:
    """Check everything that native code relies on."""
    shape = panels.shape
    if panels.dtype is not torch.uint8 or not panels.is_cpu:
        raise ValueError(f"panels: {panels.dtype} on {panels.device}")
    if panels.ndim != 3 or shape[2] != INT8_BLOCK_BYTES or not panels.is_contiguous():
        raise ValueError(f"panels of shape {tuple(shape)} and strides {panels.stride()}")
    if inputs.dtype not in STORED_DTYPES or not inputs.is_cpu:
        raise ValueError(f"inputs: {inputs.dtype} on {inputs.device}")
    gap = shape[1] * INT8_BLOCK_COLUMNS - inputs.shape[1] if inputs.ndim == 2 else -1
    if gap not in (0, TWO_FOUR.column_multiple):
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} for {shape[1]} blocks of columns")
    if (rows + INT8_PANEL_ROWS - 1) // INT8_PANEL_ROWS != shape[0]:
        raise ValueError(f"{rows} rows in {shape[0]} panels of {INT8_PANEL_ROWS}")
    if scale.dtype is not torch.float32 or scale.shape != (rows,) or not scale.is_contiguous():
        raise ValueError(f"scale: {scale.dtype} of shape {tuple(scale.shape)} for {rows} rows")
    if bias is not None and (bias.shape != (rows,) or not bias.is_cpu):
        raise ValueError(f"bias of shape {tuple(bias.shape)} for {rows} rows")
