"""Products of bfloat16 activations on processors that multiply bfloat16 themselves.

They read the panels that the kernels of float32 sums read, but nothing is widened: AVX-512 with
BF16 multiplies pairs of bfloat16 values and adds both products to a float32 sum. In a 2:4 weight a
pair is the two kept values of a group. A token's result has the same bits in every batch and with
any number of threads; on AMX's matrix unit, which takes 16 tokens at once, only the latter. As the
instructions have it, denormal numbers count as zero. Where an input is infinite or NaN, ``CpuBf16``
differs from the dense product as ``CpuDirect`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.devices import dtype_name
from sparseserve.serving.kernels.cpu.kernels import check_panels
from sparseserve.serving.kernels.cpu.layout import (
    BLOCK_COLUMNS,
    PAIR_VALUES,
    block_values,
    dense_panels,
    two_four_panels,
)
from sparseserve.serving.kernels.cpu.library import (
    Bf16Operation,
    Bf16Unit,
    Tiles,
    missing_library,
    native_library,
)
from sparseserve.serving.kernels.cpu.token_groups import TokenGroup, require_groups
from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Bf16Kernel:
    """What all of them share.

    Attributes:
        unit: Vector unit; None is the best of the processor, which must not be the portable one.
    """

    largest_batch: ClassVar[int | None] = None
    operation: ClassVar[Bf16Operation]
    block_columns: ClassVar[int]
    block_width: ClassVar[int]

    unit: Bf16Unit | None = None

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply any number of rows of inputs."""
        self._check(packed[0], inputs, rows)
        product = inputs.new_empty(len(inputs), rows)
        if len(inputs):
            self._run(packed[0], inputs, None if bias is None else _bias(bias, (rows,)), product)
        return product

    def matmul_groups(
        self,
        panels: Tensor,
        inputs: Tensor,
        groups: Sequence[TokenGroup],
        bias: Tensor | None,
        product: Tensor,
    ) -> None:
        """Multiply groups of tokens, each by a weight of its own; the threads share all of them.

        Args:
            panels: ``[weights, panels, blocks, values]``.
            inputs: ``[tokens, columns]``.
            groups: Which weight multiplies which tokens.
            bias: ``[weights, rows]`` or None.
            product: ``[tokens, rows]``, filled where a group has tokens.
        """
        if not groups:
            return
        rows = product.shape[1]
        self._check(panels[0], inputs, rows)
        require_groups(groups, weights=len(panels), tokens=len(inputs))
        if product.dtype is not BF16 or len(product) != len(inputs) or not product.is_contiguous():
            raise ValueError(f"product: {product.dtype} of shape {tuple(product.shape)}")
        bias = None if bias is None else _bias(bias, (len(panels), rows))
        self._run(panels, inputs, bias, product, torch.tensor(groups))

    def _check(self, panels: Tensor, inputs: Tensor, rows: int) -> None:
        columns = panels.shape[1] * self.block_columns
        check_panels(panels, inputs, rows=rows, columns=columns, width=self.block_width)
        if panels.dtype is not BF16 or inputs.dtype is not BF16:
            raise ValueError(f"panels: {panels.dtype}, inputs: {inputs.dtype}: not bfloat16")

    def _run(
        self,
        panels: Tensor,
        inputs: Tensor,
        bias: Tensor | None,
        product: Tensor,
        groups: Tensor | None = None,
    ) -> None:
        native_library().run_bf16(
            self.operation,
            panels,
            inputs.contiguous(),
            bias,
            product,
            groups=groups,
            unit=self.unit,
        )


@dataclass(frozen=True, slots=True)
class CpuBf16(_Bf16Kernel):
    """Multiplies each pair of kept values by the inputs that its positions pick."""

    layout: ClassVar[str] = "cpu_2of4"
    operation: ClassVar[Bf16Operation] = Bf16Operation.TWO_FOUR
    block_columns: ClassVar[int] = BLOCK_COLUMNS
    block_width: ClassVar[int] = block_values(BF16)

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse what is not wholly 2:4, other dtypes, and processors that would emulate them."""
        return _unsupported(spec) if spec.two_four else "a module of the layer is dense"

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the 2:4 panels."""
        return (two_four_panels(weight.packed(), BF16),)


@dataclass(frozen=True, slots=True)
class CpuBf16Tiles(CpuBf16):
    """Restores the zeros of a few columns at a time and multiplies them on AMX's matrix unit.

    Where an input is infinite or NaN, it gives what the dense product does.
    """

    operation: ClassVar[Bf16Operation] = Bf16Operation.TILES

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse what :class:`CpuBf16` does, and processors and systems without tiles."""
        if reason := CpuBf16.unsupported(self, spec):
            return reason
        return {
            Tiles.READY: None,
            Tiles.MISSING: "this processor has no AMX",
            Tiles.REFUSED: "the operating system does not let this process use AMX",
        }[native_library().tiles]


@dataclass(frozen=True, slots=True)
class CpuBf16Dense(_Bf16Kernel):
    """Multiplies by a dense weight in panels: tells the gain of sparsity from that of layout."""

    layout: ClassVar[str] = "cpu_dense"
    operation: ClassVar[Bf16Operation] = Bf16Operation.DENSE
    block_columns: ClassVar[int] = 2
    block_width: ClassVar[int] = PAIR_VALUES

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Refuse wholly 2:4 layers, other dtypes, and processors that would emulate them."""
        if spec.two_four and not spec.quantized:
            return "every module of the layer is 2:4"
        return _unsupported(spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the dense panels."""
        return (dense_panels(weight.dense(), BF16),)


def _unsupported(spec: LinearSpec) -> str | None:
    if refusal := spec.float_refusal():
        return refusal
    if spec.device.type != "cpu":
        return f"runs on a CPU, not on {spec.device.type}"
    if spec.dtype is not BF16:
        return f"multiplies bfloat16, not {dtype_name(spec.dtype)}"
    if missing := missing_library():
        return missing
    if native_library().bf16_units == (Bf16Unit.PORTABLE,):
        return "this processor has no AVX-512 with BF16"
    return None


def _bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    if bias.shape != shape or not bias.is_cpu:
        raise ValueError(f"bias of shape {tuple(bias.shape)} for {shape[-1]} rows")
    return bias.to(BF16).contiguous()
