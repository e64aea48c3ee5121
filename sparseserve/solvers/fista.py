"""FISTA on the layer problem with an l1 penalty.

    minimise over W   1/2 tr(W G W^T) - tr(W B^T) + lambda ||W||_1

Beck and Teboulle 2009, "A fast iterative shrinkage-thresholding algorithm for linear inverse
problems", SIAM Journal on Imaging Sciences 2(1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.solvers.problem import OperatorProblem


@dataclass(frozen=True, slots=True)
class FistaResult:
    """Where an iteration ended.

    Attributes:
        weight: The last iterate, ``[out, in]``.
        iterations: Products with the Gram matrix that were spent.
        last_step: ``||W_k - W_{k-1}||_F`` of the last two iterates; 0 if none was taken.
        converged: Whether a tolerance was met before the iterations ran out.
    """

    weight: Tensor
    iterations: int
    last_step: float
    converged: bool


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Return ``sign(w) max(|w| - t, 0)``, the proximal map of ``t ||.||_1``."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


def kkt_residual(gradient: Tensor, weight: Tensor, l1: Tensor | float) -> Tensor:
    """Return ``[out, in]`` distances of ``-gradient`` to ``l1 * d|w|``; zero at a minimiser."""
    at_zero = (gradient.abs() - l1).clamp_min(0)
    return torch.where(weight == 0, at_zero, (gradient + l1 * weight.sign()).abs())


def fista(
    problem: OperatorProblem,
    start: Tensor,
    *,
    l1: Tensor | float,
    lipschitz: float,
    iterations: int,
    step_tolerance: float = 0.0,
    kkt_tolerance: float = 0.0,
    restart: bool = False,
) -> FistaResult:
    """Run FISTA with the constant step ``1 / lipschitz``.

    Args:
        problem: The quadratic.
        start: First iterate, ``[out, in]``.
        l1: Penalty in the units of ``problem.target``; a scalar or one value a row, ``[out, 1]``.
        lipschitz: At least the largest eigenvalue of the Gram matrix.
        iterations: Most products with the Gram matrix.
        step_tolerance: Stop when ``||W_{k+1} - W_k||_F`` falls below it.
        kkt_tolerance: Stop when the KKT residual falls below it (costs no product: it is taken
            at the extrapolated point, where the gradient is already known).
        restart: Drop the momentum of a row whenever it points uphill (O'Donoghue and Candes
            2015, "Adaptive restart for accelerated gradient schemes", section 3.2).
    """
    weight = point = start
    momentum = torch.ones(len(start), 1, dtype=start.dtype, device=start.device)
    step = torch.zeros_like(start)
    spent, converged = 0, False
    for _ in range(iterations):
        gradient = problem.gradient(point)
        spent += 1
        if kkt_tolerance and float(kkt_residual(gradient, point, l1).max()) < kkt_tolerance:
            weight, converged = point, True
            break
        updated = soft_threshold(point - gradient / lipschitz, l1 / lipschitz)
        step = updated - weight
        if restart:
            uphill = ((point - updated) * step).sum(dim=-1, keepdim=True) > 0
            momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + torch.sqrt(1 + 4 * momentum.square())) / 2
        point = updated + (momentum - 1) / following * step
        weight, momentum = updated, following
        if step_tolerance and float(step.norm()) < step_tolerance:
            converged = True
            break
    return FistaResult(weight, spent, float(step.norm()), converged)
