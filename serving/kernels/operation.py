"""The one operator through which every planned layer multiplies.

To torch, when it compiles, it is opaque and has a fake implementation, so torch.compile and CUDA
graphs take it as it is. It measures nothing and keeps nothing: which kernel runs a batch is in its
``plan`` argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseserve.serving.kernels.choice.plan import parse_plan
from sparseserve.serving.kernels.table import KERNELS

_NAME = "sparseserve::two_four_linear"
_SCHEMA = "(Tensor inputs, Tensor[] packed, Tensor? bias, str plan, int rows) -> Tensor"


def two_four_linear(
    inputs: Tensor, packed: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int
) -> Tensor:
    """Multiply; while torch compiles or traces, through its dispatcher.

    Args:
        inputs: ``[..., columns]``.
        packed: What the layer keeps, for all kernels of the plan.
        bias: ``[rows]`` or None.
        plan: A :class:`~sparseserve.serving.kernels.choice.plan.KernelPlan` as text.
        rows: Output features.

    Returns:
        ``[..., rows]`` of the inputs' dtype.
    """
    # The dispatcher takes as long as a product of a small layer: go through it where it is needed.
    if type(inputs) is Tensor and not torch.compiler.is_compiling():
        return _run(inputs, packed, bias, plan, rows)
    product: Tensor = torch.ops.sparseserve.two_four_linear(inputs, packed, bias, plan, rows)
    return product


def _run(
    inputs: Tensor, packed: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int
) -> Tensor:
    if inputs.ndim != 2 or not inputs.is_contiguous():
        flat = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        return _run(flat, packed, bias, plan, rows).view(*inputs.shape[:-1], rows)
    step = parse_plan(plan).step(len(inputs))
    return KERNELS[step.kernel].matmul(packed[step.first : step.stop], inputs, bias, rows)


def _shape(
    inputs: Tensor, packed: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int
) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], rows)


torch.library.define(_NAME, _SCHEMA)
torch.library.impl(_NAME, ("cpu", "cuda"), _run)
torch.library.register_fake(_NAME, _shape)
