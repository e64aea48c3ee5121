"""Refit: the mask of another pruner, with the best values on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparseserve.errors import RecipeError, unknown_name
from sparseserve.pruners.admm_gradual import GradualAdmm
from sparseserve.pruners.dsnot import Dsnot
from sparseserve.pruners.fista_paper import ENDING_PAPER_FISTA
from sparseserve.pruners.one_shot import ONE_SHOT
from sparseserve.pruners.protocol import PrunedWeight, Pruner, SolverStatus
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.problem import OperatorProblem, better_rows, operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern

# Those that search with a refit of their own (admm, fista) gain nothing here.
BASES: dict[str, Pruner] = {
    **ONE_SHOT,
    "dsnot": Dsnot(),
    "admm-gradual": GradualAdmm(),
    "fista-paper": ENDING_PAPER_FISTA,
}


@dataclass(frozen=True, slots=True)
class Refit:
    """Least squares on the mask of ``base``, by preconditioned conjugate gradients.

    Attributes:
        base: The pruner whose mask is kept, with its own defaults.
        iterations: Conjugate-gradient steps.
        damping: Share of the mean diagonal added to both Gram matrices; pulls towards ``W0``.
    """

    base: str = "wanda"
    iterations: int = 40
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise RecipeError(f"refit: {unknown_name('base', self.base, BASES)}")
        if self.iterations < 1 or not self.damping > 0:
            raise RecipeError("refit: iterations and damping must be positive")

    @property
    def rows_are_independent(self) -> bool:
        """Whether rows can be stacked: as for the pruner it starts from."""
        return BASES[self.base].rows_are_independent

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Return the refitted weight, or the base's own in rows where that is better."""
        start = BASES[self.base].prune(dense_weight, statistics, pattern)
        problem = operator_problem(dense_weight, statistics, self.damping)
        return refitted(start, problem, self.iterations)


def refitted(start: PrunedWeight, problem: OperatorProblem, iterations: int) -> PrunedWeight:
    """Return ``start`` with the best values on its mask, row by row no worse than it was."""
    result = refit(problem, start.weight != 0, start.weight, iterations=iterations)
    # Both have the same mask, so rows may be mixed whatever the pattern.
    best = better_rows(problem, start.weight, result.weight)
    status = SolverStatus(result.converged, result.residual)
    return PrunedWeight(best, start.gram_products + result.iterations + 2, status)
