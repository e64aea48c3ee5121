"""Products of a mixture's experts: 2:4 weights of one shape, each with tokens of its own.

An expert sees few tokens even where a server's batch is large, so most of a step's time goes into
reading weights, and those are 9/16 of the dense ones' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.choice.choose import (
    KERNELS_VARIABLE,
    LayerKernels,
    TimedLayers,
    allowed_kernels,
    layer_kernels,
)
from sparseserve.serving.kernels.cpu.bf16_kernels import CpuBf16
from sparseserve.serving.kernels.cpu.layout import two_four_panels
from sparseserve.serving.kernels.cpu.token_groups import TokenGroup
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.table import KERNELS


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of all experts' linears of one kind.

    Attributes:
        panels: ``[experts, panels, blocks, values]``.
        rows: Output features of each.
        kernels: Which kernel multiplies how many tokens of one expert.
    """

    panels: Tensor
    rows: int
    kernels: LayerKernels

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
        by_kernel: dict[str, list[TokenGroup]] = {}
        for group in groups:
            by_kernel.setdefault(self.kernels.kernel(group.tokens), []).append(group)
        for name, own in by_kernel.items():
            kernel = KERNELS[name]
            if isinstance(kernel, CpuBf16):
                kernel.matmul_groups(self.panels, inputs, own, bias, product)
                continue
            for weight, first, tokens in own:
                product[first : first + tokens] = kernel.matmul(
                    (self.panels[weight],),
                    inputs[first : first + tokens],
                    None if bias is None else bias[weight],
                    self.rows,
                )
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
        ServingError: No kernel can run them, or the weight of an expert is not 2:4.
    """
    experts, rows, columns = weights.shape
    spec = LinearSpec(rows, columns, weights.dtype, weights.device, two_four=True)
    kernels = _able(spec)
    # Experts whose values need more bits than others' would have panels of another dtype.
    stored = LoadedWeight((RowBlock(name, weights),)).storage_dtype()
    packed = [RowBlock(f"{name}.{number}", weights[number]).packed() for number in range(experts)]
    example = LoadedWeight((RowBlock(name, packed[0]),))
    chosen = layer_kernels(spec, example, tell, kernels, timed)
    panels = torch.stack([two_four_panels(weight, stored) for weight in packed])
    return ExpertWeights(panels, rows, replace(chosen, packed=()))


def _able(spec: LinearSpec) -> Mapping[str, LinearKernel]:
    reading = {name: k for name, k in allowed_kernels().items() if k.layout == CpuBf16.layout}
    reasons = {name: kernel.unsupported(spec) for name, kernel in reading.items()}
    able = {name: kernel for name, kernel in reading.items() if reasons[name] is None}
    if not able:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ServingError(told or f"{KERNELS_VARIABLE} leaves no kernel for them")
    return able
