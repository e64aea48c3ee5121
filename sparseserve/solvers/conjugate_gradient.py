"""Least squares on a fixed mask: the best values for the weights that stay.

    minimise over W with support in M   1/2 tr(W G W^T) - tr(W B^T)

Rows are independent, so all are advanced together, each with its own step (Hestenes and Stiefel
1952), preconditioned by the diagonal of ``G`` (Saad, "Iterative Methods for Sparse Linear
Systems", algorithm 9.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.solvers.problem import OperatorProblem


@dataclass(frozen=True, slots=True)
class RefitResult:
    """Where an iteration ended.

    Attributes:
        weight: The refitted weight, ``[out, in]``.
        iterations: Products with the Gram matrix that were spent.
        residual: Preconditioned residual of the worst row, as a share of what it was at zero.
        converged: Whether every row met the tolerance before the iterations ran out.
    """

    weight: Tensor
    iterations: int
    residual: float
    converged: bool


def refit(
    problem: OperatorProblem,
    mask: Tensor,
    start: Tensor,
    *,
    iterations: int,
    tolerance: float = 1e-6,
) -> RefitResult:
    """Improve ``start`` on the boolean ``mask``, both ``[out, in]``, by conjugate gradients.

    Args:
        problem: The quadratic.
        mask: True where a weight may be non-zero.
        start: First iterate; entries outside the mask are dropped.
        iterations: Most products with the Gram matrix.
        tolerance: Stop when the preconditioned residual of every row has fallen to this share
            of what it was at zero.
    """
    preconditioner = problem.gram.diagonal().reciprocal()
    weight = start.where(mask, 0)
    residual = (-problem.gradient(weight)).where(mask, 0)
    spent = 1
    scale = (problem.target.where(mask, 0).square() * preconditioner).sum(dim=-1, keepdim=True)
    direction = residual * preconditioner
    energy = (residual * direction).sum(dim=-1, keepdim=True)
    while spent < iterations and bool((energy > tolerance**2 * scale).any()):
        image = (direction @ problem.gram).where(mask, 0)
        spent += 1
        curvature = (direction * image).sum(dim=-1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)
        weight = weight + step * direction
        residual = residual - step * image
        preconditioned = residual * preconditioner
        following = (residual * preconditioned).sum(dim=-1, keepdim=True)
        ratio = torch.where(energy > 0, following / energy, 0)
        direction = preconditioned + ratio * direction
        energy = following
    worst = (energy / scale).where(scale > 0, 0).amax().clamp_min(0).sqrt()
    converged = not bool((energy > tolerance**2 * scale).any())
    return RefitResult(weight, spent, float(worst), converged)
