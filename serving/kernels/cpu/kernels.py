"""2:4 products on a processor, straight from packed weights.

Three kernels read one packed form (``cpu_layout``), so a layer keeps 1.125 bytes a weight and no
dense copy. Sums are float32 whatever the dtypes are; inputs and outputs of other dtypes are
converted. Where an input is infinite or NaN, ``CpuDirect`` differs from the dense product: a zero
that is not stored is not multiplied, so it does not make NaN of an infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve.serving.kernels.cpu.layout import (
    BLOCK_COLUMNS,
    PAIR_VALUES,
    PANEL_ROWS,
    block_values,
    dense_panels,
    two_four_panels,
)
from sparseserve.serving.kernels.cpu.library import (
    STORED_DTYPES,
    Operation,
    Unit,
    missing_library,
    native_library,
)
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight

# Four rows are multiplied at a time: with more rows unpacking, done once, is the better way.
DIRECT_BATCH = 16
# Panels unpacked at once for torch's product: enough for it to run at full speed.
_UNPACKED_PANELS = 16


@dataclass(frozen=True, slots=True)
class _CpuTwoFour:
    """What the kernels that read 2:4 panels share.

    Attributes:
        unit: Vector unit; None is the best of the processor.
    """

    layout: ClassVar[str] = "cpu_2of4"
    largest_batch: ClassVar[int | None] = None

    unit: Unit | None = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse what is not wholly 2:4, other devices and other dtypes."""
        return _unsupported(spec) if spec.two_four else "a module of the layer is dense"

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the 2:4 panels."""
        return (two_four_panels(weight.packed(), weight.storage_dtype()),)


@dataclass(frozen=True, slots=True)
class CpuDirect(_CpuTwoFour):
    """Multiplies without unpacking: each kept value by the input its position picks."""

    largest_batch: ClassVar[int | None] = DIRECT_BATCH

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply a few rows of inputs."""
        if inputs.shape[0] > DIRECT_BATCH:
            raise ValueError(f"a batch of {len(inputs)} where {DIRECT_BATCH} is the most")
        return _multiply(Operation.DIRECT, packed[0], inputs, bias, rows=rows, unit=self.unit)


@dataclass(frozen=True, slots=True)
class CpuUnpacked(_CpuTwoFour):
    """Unpacks a chunk of a panel into the cache at a time and multiplies it densely."""

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply any number of rows of inputs."""
        return _multiply(Operation.UNPACKED, packed[0], inputs, bias, rows=rows, unit=self.unit)


@dataclass(frozen=True, slots=True)
class CpuUnpackedMatmul(_CpuTwoFour):
    """Unpacks some hundred rows at a time and leaves the product to torch. For long prompts."""

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply any number of rows of inputs."""
        panels = packed[0]
        columns, width = panels.shape[1] * BLOCK_COLUMNS, block_values(panels.dtype)
        x = _prepared(panels, inputs, rows=rows, columns=columns, width=width)
        product = x.new_empty(len(x), len(panels) * PANEL_ROWS)
        for start in range(0, len(panels), _UNPACKED_PANELS):
            part = panels[start : start + _UNPACKED_PANELS]
            weight = x.new_empty(columns, len(part) * PANEL_ROWS)
            native_library().run(
                Operation.UNPACK, part, None, weight, columns=columns, unit=self.unit
            )
            first = start * PANEL_ROWS
            product[:, first : first + weight.shape[1]] = x @ weight
        # The rows that fill up the last panel go; what is left has to be contiguous again.
        return _finished(product[:, :rows].contiguous(), bias, inputs.dtype)


@dataclass(frozen=True, slots=True)
class CpuDense:
    """Multiplies by a dense weight in panels, of 16-bit values where they are exact.

    What the 2:4 kernels have to be compared with, to tell the gain of sparsity from that of storage
    and layout. Also runs layers of which only a part is 2:4.

    Attributes:
        unit: Vector unit; None is the best of the processor.
    """

    layout: ClassVar[str] = "cpu_dense"
    largest_batch: ClassVar[int | None] = None

    unit: Unit | None = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse wholly 2:4 layers, which take less in the packed form, and other devices."""
        if spec.two_four and not spec.quantized:
            return "every module of the layer is 2:4"
        return _unsupported(spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the dense panels."""
        return (dense_panels(weight.dense(), weight.storage_dtype()),)

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply any number of rows of inputs."""
        return _multiply(Operation.DENSE, packed[0], inputs, bias, rows=rows, unit=self.unit)


def _unsupported(spec: LinearSpec) -> str | None:
    if refusal := spec.float_refusal():
        return refusal
    if spec.device.type != "cpu":
        return f"runs on a CPU, not on {spec.device.type}"
    if spec.dtype not in STORED_DTYPES:
        return f"does not know {spec.dtype}"
    return missing_library()


# A product of a small layer takes microseconds, as does each call of torch: so there are few below.


def _multiply(
    operation: Operation,
    panels: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
    *,
    rows: int,
    unit: Unit | None,
) -> Tensor:
    if operation is Operation.DENSE:
        columns, width = panels.shape[1] * 2, PAIR_VALUES
    else:
        columns, width = panels.shape[1] * BLOCK_COLUMNS, block_values(panels.dtype)
    x = _prepared(panels, inputs, rows=rows, columns=columns, width=width)
    batch, _ = x.shape
    product = x.new_empty(batch, rows)
    if batch:
        native_library().run(operation, panels, x, product, columns=columns, unit=unit)
    return _finished(product, bias, inputs.dtype)


def _prepared(panels: Tensor, inputs: Tensor, *, rows: int, columns: int, width: int) -> Tensor:
    """Check the operands; return the inputs as native code reads them."""
    gap = check_panels(panels, inputs, rows=rows, columns=columns, width=width)
    if inputs.dtype is not torch.float32 or not inputs.is_contiguous():
        inputs = inputs.float().contiguous()
    return pad(inputs, (0, gap)) if gap else inputs


def check_panels(panels: Tensor, inputs: Tensor, *, rows: int, columns: int, width: int) -> int:
    """Check everything that native code relies on.

    Args:
        panels: ``[panels, blocks, width]``.
        inputs: ``[batch, columns]``, or as many columns as filling up to a block left away.
        rows: Output features.
        columns: Of the panels.
        width: Values of a block, or of a pair of dense columns.

    Returns:
        How many columns the inputs lack.

    Raises:
        ValueError: Operands do not belong together.
    """
    stored, given, shape = panels.dtype, inputs.dtype, panels.shape
    if stored not in STORED_DTYPES or not panels.is_cpu:
        raise ValueError(f"panels: {stored} on {panels.device}")
    if given not in STORED_DTYPES or not inputs.is_cpu:
        raise ValueError(f"inputs: {given} on {inputs.device}")
    if panels.ndim != 3 or shape[2] != width or not panels.is_contiguous():
        raise ValueError(f"panels of shape {tuple(shape)} and strides {panels.stride()}")
    gap = columns - inputs.shape[1] if inputs.ndim == 2 else -1
    if not 0 <= gap < BLOCK_COLUMNS:
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} for {columns} columns")
    if (rows + PANEL_ROWS - 1) // PANEL_ROWS != shape[0]:
        raise ValueError(f"{rows} rows in {shape[0]} panels of {PANEL_ROWS}")
    return gap


def _finished(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        product += bias
    return product if dtype == torch.float32 else product.to(dtype)
