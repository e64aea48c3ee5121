"""RMS norms in one operator on a CPU, where vLLM runs some ten of torch's for each.

vLLM has the operators for CPUs, but only its GPU platforms choose them. In a small model they are a
good part of the time that one token takes. Where vLLM compiles the model they are fused anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode
from vllm.platforms import current_platform

PROVIDER = "sparseserve"
_OPERATORS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# vLLM's operators take whole vectors of AVX-512, of the narrowest dtype.
_WIDTH = 32


def use_fused_norms(vllm_config: Any) -> bool:
    """Let the model that this process serves take vLLM's fused norms.

    Args:
        vllm_config: Of the engine. What its user chose himself is left.

    Returns:
        Whether they are taken.
    """
    chosen = vllm_config.kernel_config.ir_op_priority
    wanted = [getattr(chosen, operator.name, None) for operator in _OPERATORS]
    eager = vllm_config.compilation_config.mode in {None, CompilationMode.NONE}
    if not (current_platform.is_cpu() and eager and wanted == [["native"]] * len(_OPERATORS)):
        return False
    current_platform.import_kernels()
    for operator in _OPERATORS:
        operator.set_default([PROVIDER, "native"])
    return True


def _norm_fits(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype is x.dtype
        and x.dtype in _DTYPES
        and x.shape[-1] % _WIDTH == 0
        and x.is_contiguous()
    )


def _sum_fits(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    same = x_residual.dtype is x.dtype and x_residual.is_contiguous()
    return same and _norm_fits(x, weight, epsilon, variance_size)


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


# Known to vLLM from the import of this file on, and taken by no model that does not ask for it.
ir.ops.rms_norm.register_impl(
    PROVIDER, supported=current_platform.is_cpu(), supports_args=_norm_fits
)(_rms_norm)
ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER, supported=current_platform.is_cpu(), supports_args=_sum_fits, inplace=True
)(_fused_add_rms_norm)
