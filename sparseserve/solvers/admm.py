r"""The alternating direction method of multipliers on the layer problem with a sparsity pattern S.

    minimise over W, Z   1/2 tr(W G W^T) - tr(W B^T)   subject to   W = Z,   Z in S

    W = (B + rho (Z - U)) (G + rho I)^-1        Z = Pi_S(W + U)        U = U + W - Z

``U`` is the scaled multiplier and ``Pi_S`` the projection. S is not convex, so the penalty decides
the quality: while it is small the support moves freely, and as it grows the support settles.

Meng et al. 2024, "ALPS: Improved optimization for highly sparse one-shot pruning for large
language models", NeurIPS (growing penalty); Boza 2024, "Fast and effective weight update for
pruned large language models", TMLR (fixed penalty, gradual mask).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.solvers.linalg import shifted_factor, shifted_inverse
from sparseserve.solvers.problem import OperatorProblem
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class AdmmResult:
    """Where an iteration ended.

    Attributes:
        weight: The last ``Z``, ``[out, in]``, which obeys the pattern.
        iterations: Updates of ``W``.
        gram_products: Cost in products of an ``[out, in]`` with an ``[in, in]`` matrix.
        primal_residual: ``||W - Z||_F / ||Z||_F`` at the end; zero when the two agree.
        settled: Whether the support came to rest before the iterations ran out.
    """

    weight: Tensor
    iterations: int
    gram_products: int
    primal_residual: float
    settled: bool


class _Systems:
    """Solves ``X (G + rho I) = R`` for one ``rho`` after another, each for some ``R``.

    A product with the inverse is faster than two triangular solves. But forming the inverse takes
    twice as long as the factor that both need, which few rows do not repay.
    """

    def __init__(self, problem: OperatorProblem, solves: int) -> None:
        self._gram = problem.gram
        rows, self._columns = problem.reference.shape
        self._inverts = solves * rows >= self._columns
        # Twice their shares by arithmetic, and about what they take on the clock.
        self._charge = self._columns / rows / (1 if self._inverts else 3)
        self._charged = 0.0
        self._solves = 0

    def prepare(self, penalty: float) -> None:
        """Take ``penalty`` for ``rho`` from now on."""
        make = shifted_inverse if self._inverts else shifted_factor
        self._matrix = make(self._gram, penalty)
        self._charged += self._charge

    def solve(self, right: Tensor) -> Tensor:
        """Return ``R (G + rho I)^-1``."""
        self._solves += 1
        if self._inverts:
            return right @ self._matrix
        return torch.cholesky_solve(right.T, self._matrix).T

    @property
    def gram_products(self) -> int:
        """What all of it cost."""
        return self._solves + math.ceil(self._charged)


def admm(
    problem: OperatorProblem,
    pattern: SparsityPattern,
    *,
    first_penalty: float,
    growth: float,
    interval: int,
    settled: float,
    iterations: int,
) -> AdmmResult:
    """Tighten the pattern by a growing penalty, starting from the dense weight (ALPS).

    The inverse is formed once per penalty, so an iteration is one product; applying an
    eigendecomposition takes two, and cannot be had for the widest operators. An operator of far
    fewer outputs than inputs is solved for by the factor alone.

    Args:
        problem: The quadratic, best in columns of unit energy.
        pattern: Where zeros must be.
        first_penalty: ``rho`` of the first iterations, in units of the diagonal of ``G``.
        growth: Factor on ``rho`` after every ``interval`` iterations.
        interval: Iterations with one penalty.
        settled: Stop when a smaller share of the kept weights changed places over an interval.
        iterations: Most iterations.

    Raises:
        NumericalError: ``G + rho I`` cannot be factorised.
    """
    dense = primal = problem.reference
    auxiliary = pattern.project(dense)
    dual = dense - auxiliary
    support = auxiliary != 0
    systems, penalty = _Systems(problem, solves=interval), first_penalty
    systems.prepare(penalty)
    spent, at_rest = 0, False
    while spent < iterations and not at_rest:
        primal = systems.solve(problem.target + penalty * (auxiliary - dual))
        spent += 1
        auxiliary = pattern.project(primal + dual)
        dual = dual + primal - auxiliary
        if spent % interval:
            continue
        before, support = support, auxiliary != 0
        at_rest = float((support != before).sum()) <= settled * pattern.density * dense.numel()
        if not at_rest:
            # The multiplier itself, rho U, is kept; only its scale changes.
            penalty, dual = penalty * growth, dual / growth
            systems.prepare(penalty)
    residual = relative_distance(primal, auxiliary)
    return AdmmResult(auxiliary, spent, systems.gram_products, residual, at_rest)


def admm_gradual(
    problem: OperatorProblem,
    pattern: SparsityPattern,
    *,
    penalty: float,
    ramp: int,
    iterations: int,
) -> AdmmResult:
    """Zero more and more weights over the first ``ramp`` iterations, then keep the mask (Boza).

    At step ``t`` the share of zeros is ``s (1 - (1 - t / ramp)^3)`` of the whole matrix, ``s``
    being the final one (after Zhu and Gupta 2017). Only weights that the
    pattern would drop are zeroed, the smallest first.

    Args:
        problem: The quadratic, in columns of unit energy.
        pattern: Where zeros must be.
        penalty: ``rho``, in units of the diagonal of ``G``.
        ramp: Steps until the pattern is met.
        iterations: Projections in all, at least ``ramp``.

    Raises:
        NumericalError: ``G + rho I`` cannot be factorised.
    """
    systems, primal = _Systems(problem, solves=iterations), problem.reference
    systems.prepare(penalty)
    dual = torch.zeros_like(primal)
    auxiliary, dropped = primal, torch.zeros_like(primal, dtype=torch.bool)
    for step in range(1, iterations + 1):
        if step > 1:
            dual = dual + primal - auxiliary
            primal = systems.solve(problem.target + penalty * (auxiliary - dual))
        sought = primal + dual
        if step <= ramp:
            dropped = _smallest_dropped(sought.abs(), pattern, 1 - (1 - step / ramp) ** 3)
        auxiliary = sought.where(~dropped, 0)
    residual = relative_distance(primal, auxiliary)
    products = systems.gram_products
    return AdmmResult(auxiliary, iterations - 1, products, residual, settled=True)


def relative_distance(first: Tensor, second: Tensor) -> float:
    """Return ``||first - second||_F / ||second||_F``, or 0 where both vanish."""
    distance, size = float((first - second).norm()), float(second.norm())
    return distance / size if size > 0 else distance


def _smallest_dropped(scores: Tensor, pattern: SparsityPattern, share: float) -> Tensor:
    """Return the ``share`` of what the pattern drops that has the lowest ``scores``."""
    candidates = ~pattern.best_mask(scores)
    count = math.floor(share * int(candidates.sum()))
    order = scores.where(candidates, torch.inf).flatten().argsort(stable=True)
    chosen = torch.zeros_like(candidates).flatten()
    chosen[order[:count]] = True
    return chosen.view_as(candidates)
