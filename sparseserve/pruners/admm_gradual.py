"""ADMM with a fixed penalty and a mask that is closed gradually."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.protocol import PrunedWeight, SolverStatus
from sparseserve.solvers.admm import admm_gradual
from sparseserve.solvers.problem import operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern

# Inputs that are never active still need a scale; damping proper is added after scaling.
_LEAST_ENERGY = 1e-6


@dataclass(frozen=True, slots=True)
class GradualAdmm:
    """The method of Boza 2024, "Fast and effective weight update for pruned large language models".

    Published for symmetric statistics; on corrected ones it works towards the corrected target.
    Unlike the published program, unstructured sparsity grows gradually as N:M does.

    Attributes:
        penalty: ``rho``, where a column of unit energy has curvature 1.
        ramp: Steps over which zeros are added; the mask is fixed after them.
        iterations: Projections in all.
        damping: Added to the unit diagonal of both scaled Gram matrices; pulls towards ``W0``.
    """

    rows_are_independent: ClassVar[bool] = False

    penalty: float = 1.0
    ramp: int = 15
    iterations: int = 20
    damping: float = 0.1

    def __post_init__(self) -> None:
        if not min(self.penalty, self.damping) > 0:
            raise RecipeError("admm-gradual: penalty and damping must be positive")
        if not 1 <= self.ramp <= self.iterations:
            raise RecipeError(
                f"admm-gradual: ramp {self.ramp} must be from 1 to iterations {self.iterations}"
            )

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Run the published number of steps; the last projection is the result."""
        scaled, scale = operator_problem(dense_weight, statistics, _LEAST_ENERGY).column_scaled()
        found = admm_gradual(
            scaled.pulled(self.damping),
            pattern,
            penalty=self.penalty,
            ramp=self.ramp,
            iterations=self.iterations,
        )
        status = SolverStatus(found.settled, found.primal_residual)
        return PrunedWeight(found.weight / scale, found.gram_products, status)
