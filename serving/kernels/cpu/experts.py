"""Products of a mixture's experts: weights of one shape, each with tokens of its own.

An expert sees few tokens even where a server's batch is large, so most of a step's time goes into
reading weights, and 2:4 ones are 9/16 of the dense ones' size. A few of the experts may be dense,
such as one that no calibration token reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24, pack24
from sparseserve.checkpoint.quantized24 import Quantized24
from sparseserve.errors import ArtifactError, RecipeError, ServingError
from sparseserve.serving.kernels.choice.choose import (
    KERNELS_VARIABLE,
    LayerKernels,
    TimedLayers,
    allowed_kernels,
    layer_kernels,
)
from sparseserve.serving.kernels.cpu.bf16_kernels import CpuBf16, CpuBf16Dense
from sparseserve.serving.kernels.cpu.layout import dense_panels, two_four_panels
from sparseserve.serving.kernels.cpu.token_groups import TokenGroup
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.table import KERNELS

_GROUPED = (CpuBf16, CpuBf16Dense)


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """Those of the experts that are stored alike, 2:4 or dense.

    Attributes:
        experts: Their numbers, in the order of the panels.
        panels: ``[experts, panels, blocks, values]``.
        kernels: Which kernel multiplies how many tokens of one expert.
    """

    experts: tuple[int, ...]
    panels: Tensor
    kernels: LayerKernels

    def multiply(
        self, inputs: Tensor, groups: Sequence[TokenGroup], bias: Tensor | None, product: Tensor
    ) -> None:
        """Fill the rows of ``product`` whose tokens belong to one of these experts."""
        place = {expert: number for number, expert in enumerate(self.experts)}
        by_kernel: dict[str, list[TokenGroup]] = {}
        for expert, first, tokens in groups:
            if expert in place:
                own = by_kernel.setdefault(self.kernels.kernel(tokens), [])
                own.append(TokenGroup(place[expert], first, tokens))
        if bias is not None:
            bias = bias[list(self.experts)]
        for name, mine in by_kernel.items():
            kernel = KERNELS[name]
            if isinstance(kernel, _GROUPED):
                kernel.matmul_groups(self.panels, inputs, mine, bias, product)
                continue
            for weight, first, tokens in mine:
                product[first : first + tokens] = kernel.matmul(
                    (self.panels[weight],),
                    inputs[first : first + tokens],
                    None if bias is None else bias[weight],
                    product.shape[1],
                )


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of all experts' linears of one kind.

    Attributes:
        rows: Output features of each.
        parts: The 2:4 ones, and the dense ones where there are any.
    """

    rows: int
    parts: tuple[ExpertPart, ...]

    @property
    def experts(self) -> int:
        """How many there are."""
        return sum(len(part.experts) for part in self.parts)

    def matmul(self, inputs: Tensor, groups: Sequence[TokenGroup], bias: Tensor | None) -> Tensor:
        """Return the products of all groups of tokens, each by its expert's weight.

        Args:
            inputs: ``[tokens, columns]``, sorted by expert.
            groups: Which tokens belong to which expert; together all of them.
            bias: ``[experts, rows]`` or None.

        Returns:
            ``[tokens, rows]`` of the inputs' dtype.
        """
        product = inputs.new_empty(len(inputs), self.rows)
        for part in self.parts:
            part.multiply(inputs, groups, bias, product)
        return product


def pack_experts(
    name: str, weights: Tensor, tell: Callable[[str], None], timed: TimedLayers | None = None
) -> ExpertWeights:
    """Pack the weights of experts for the kernels of this processor.

    Args:
        name: Of the experts, for errors.
        weights: ``[experts, rows, columns]``.
        tell: Hears what a user should know.
        timed: What this engine has timed already.

    Raises:
        ServingError: No kernel can run them, or none of the experts is 2:4.
    """
    _, rows, columns = weights.shape
    blocks = [_packed_or_dense(f"{name}.{number}", one) for number, one in enumerate(weights)]
    dense = [number for number, block in enumerate(blocks) if isinstance(block.weight, Tensor)]
    two_four = [number for number in range(len(blocks)) if number not in dense]
    if not two_four:
        raise ServingError("none of them is 2:4")
    # Experts whose values need more bits than others' would have panels of another dtype.
    stored = LoadedWeight((RowBlock(name, weights),)).storage_dtype()

    def part(experts: Sequence[int], *, sparse: bool) -> ExpertPart:
        spec = LinearSpec(rows, columns, weights.dtype, weights.device, two_four=sparse)
        example = LoadedWeight((blocks[experts[0]],))
        kernels = layer_kernels(spec, example, tell, _able(spec), timed)
        panels = torch.stack([_panels(blocks[number].weight, stored) for number in experts])
        return ExpertPart(tuple(experts), panels, replace(kernels, packed=()))

    parts = [part(two_four, sparse=True)]
    parts += [part(dense, sparse=False)] if dense else []
    return ExpertWeights(rows, tuple(parts))


def _packed_or_dense(name: str, weight: Tensor) -> RowBlock:
    try:
        return RowBlock(name, pack24(weight))
    except (ArtifactError, RecipeError):  # the latter where groups do not divide it
        return RowBlock(name, weight)


def _panels(weight: Packed24 | Quantized24 | Tensor, stored: torch.dtype) -> Tensor:
    if isinstance(weight, Packed24):
        return two_four_panels(weight, stored)
    assert isinstance(weight, Tensor)
    return dense_panels(weight, stored)


def _able(spec: LinearSpec) -> Mapping[str, LinearKernel]:
    layout = CpuBf16.layout if spec.two_four else CpuBf16Dense.layout
    reading = {
        name: kernel for name, kernel in allowed_kernels().items() if kernel.layout == layout
    }
    reasons = {name: kernel.unsupported(spec) for name, kernel in reading.items()}
    able = {name: kernel for name, kernel in reading.items() if reasons[name] is None}
    if not able:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ServingError(told or f"{KERNELS_VARIABLE} leaves no kernel for them")
    # The others are called expert by expert, which the times of one product do not show.
    grouped = {name: kernel for name, kernel in able.items() if isinstance(kernel, _GROUPED)}
    return grouped or able
