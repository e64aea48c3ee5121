"""FISTA pruning as it works best: scaled inputs, relative penalties, a refit inside the search.

The method of FISTAPruner (Zhao et al., EMNLP 2025) with four repairs. Columns are scaled to unit
energy, so the penalty means the same for every input; penalties are relative to the target, so
they mean the same for every operator and token count; each candidate mask is refitted by least
squares before it is judged; and the best candidate is kept row by row, so the result is never
worse than its warm start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.protocol import PrunedWeight, Pruner, SolverStatus
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import fista
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import OperatorProblem, better_candidate, operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern

WarmStart = Literal["wanda", "sparsegpt", "admm"]


def warm_starts(damping: float) -> dict[str, Pruner]:
    """Return the pruners to start from, which damp the problem as the search itself does."""
    return {
        "wanda": Wanda(),
        "sparsegpt": SparseGPT(damping=damping),
        "admm": Admm(damping=damping),
    }


@dataclass(frozen=True, slots=True)
class Fista:
    """Search over penalties from a warm start.

    Attributes:
        warm_start: The pruner whose result is improved.
        penalties: Values of lambda tried in this order, in units of the mean absolute target.
        iterations: FISTA steps per penalty.
        candidate_refit: Conjugate-gradient steps before a candidate is judged.
        final_refit: Conjugate-gradient steps on the mask that won.
        damping: Share of the mean diagonal added to both Gram matrices; pulls towards ``W0``.
    """

    rows_are_independent: ClassVar[bool] = True

    warm_start: WarmStart = "admm"
    penalties: tuple[float, ...] = (0.5, 0.1)
    iterations: int = 10
    candidate_refit: int = 6
    final_refit: int = 30
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.warm_start not in (known := get_args(WarmStart)):
            raise RecipeError(
                f"fista: warm_start '{self.warm_start}' is not one of {', '.join(known)}"
            )
        if any(not penalty > 0 for penalty in self.penalties):
            raise RecipeError(f"fista: penalties {list(self.penalties)} must be positive")
        counts = (self.iterations, self.candidate_refit, self.final_refit)
        if min(counts) < 1 or not self.damping > 0:
            raise RecipeError("fista: iterations, refits and damping must be positive")

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Return the best candidate found, at least as good as the warm start in every row.

        Where the pattern binds rows together (unstructured over the matrix), candidates are
        compared as wholes instead.
        """
        start = warm_starts(self.damping)[self.warm_start].prune(dense_weight, statistics, pattern)
        plain = operator_problem(dense_weight, statistics, self.damping)
        problem, scale = plain.column_scaled()
        warm = start.weight * scale
        best = better_candidate(
            problem, pattern, warm, self._refit(problem, warm, self.candidate_refit)
        )
        lipschitz = largest_eigenvalue(problem.gram)
        typical = float(problem.target.abs().mean())
        for penalty in self.penalties:
            relaxed = fista(
                problem,
                best,
                l1=penalty * typical,
                lipschitz=lipschitz,
                iterations=self.iterations,
                restart=True,
            ).weight
            candidate = self._refit(problem, pattern.project(relaxed), self.candidate_refit)
            best = better_candidate(problem, pattern, best, candidate)
        final = refit(problem, best != 0, best, iterations=self.final_refit)
        best = better_candidate(problem, pattern, best, final.weight)
        products = start.gram_products + self.final_refit + self.candidate_refit
        products += len(self.penalties) * (self.iterations + self.candidate_refit)
        products += 2 * (len(self.penalties) + 3)  # comparisons of two candidates
        weight = better_candidate(plain, pattern, start.weight, best / scale)
        return PrunedWeight(weight, products, SolverStatus(final.converged, final.residual))

    @staticmethod
    def _refit(problem: OperatorProblem, weight: Tensor, iterations: int) -> Tensor:
        return refit(problem, weight != 0, weight, iterations=iterations).weight
