"""ADMM with a growing penalty: the pattern is tightened slowly, from the dense weight.

The scheme of ALPS (Meng et al., NeurIPS 2024), here on the general objective,
so that it also repairs the errors of operators pruned before. Three things differ, each measured:
the penalty grows by one factor whatever the support does, which is as good at equal cost; the
first, idle iteration is left out; and one inverse per penalty replaces the eigendecomposition,
which halves the products of an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.one_shot import ONE_SHOT
from sparseserve.pruners.protocol import PrunedWeight, SolverStatus
from sparseserve.solvers.admm import admm
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.problem import better_candidate, operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class Admm:
    """ADMM, a refit of its mask, and a warm start to fall back on.

    Attributes:
        warm_start: The one-shot pruner that the result is never worse than, refitted.
        first_penalty: ``rho`` at the start, where a column of unit energy has curvature 1.
        growth: Factor on the penalty. Nearer to 1 is slower and slightly better.
        interval: Iterations with one penalty.
        settled: Share of kept weights that may still change places when the search ends.
        iterations: Most iterations; it settles long before.
        candidate_refit: Conjugate-gradient steps before ADMM and the warm start are compared.
        final_refit: Conjugate-gradient steps on what is kept of the two.
        damping: Share of the mean diagonal added to both Gram matrices; pulls towards ``W0``.
    """

    rows_are_independent: ClassVar[bool] = True

    warm_start: str = "wanda"
    first_penalty: float = 0.1
    growth: float = 1.3
    interval: int = 3
    settled: float = 3e-4
    iterations: int = 120
    candidate_refit: int = 4
    final_refit: int = 12
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.warm_start not in ONE_SHOT:
            raise RecipeError(
                f"admm: warm_start '{self.warm_start}' is not one of {', '.join(ONE_SHOT)}"
            )
        if not self.growth > 1:
            raise RecipeError(f"admm: growth {self.growth} must be above 1")
        counts = (self.interval, self.iterations, self.candidate_refit, self.final_refit)
        if min(counts) < 1 or not min(self.first_penalty, self.damping) > 0 or self.settled < 0:
            raise RecipeError(
                "admm: first_penalty, damping, interval, iterations and refits must be positive, "
                "settled not negative"
            )

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Return the better of ADMM and the refitted warm start, row by row.

        Where the pattern binds rows together (unstructured over the matrix) they are compared as
        wholes.
        """
        problem = operator_problem(dense_weight, statistics, self.damping)
        scaled, scale = problem.column_scaled()
        found = admm(
            scaled,
            pattern,
            first_penalty=self.first_penalty,
            growth=self.growth,
            interval=self.interval,
            settled=self.settled,
            iterations=self.iterations,
        )
        start = ONE_SHOT[self.warm_start].prune(dense_weight, statistics, pattern)
        products = found.gram_products + start.gram_products
        candidates = []
        for weight in (start.weight, found.weight / scale):
            result = refit(problem, weight != 0, weight, iterations=self.candidate_refit)
            candidates.append(result.weight)
            products += result.iterations
        best = better_candidate(problem, pattern, *candidates)
        final = refit(problem, best != 0, best, iterations=self.final_refit)
        # Two products went into the comparison.
        status = SolverStatus(found.settled, found.primal_residual)
        return PrunedWeight(final.weight, products + 2 + final.iterations, status)
