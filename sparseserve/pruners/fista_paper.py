"""FISTAPruner to the letter (Zhao et al., EMNLP 2025, sections 3.2 to 3.4 and algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.fista import WarmStart, warm_starts
from sparseserve.pruners.protocol import PrunedWeight, SolverStatus
from sparseserve.solvers.fista import fista
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import OperatorProblem, operator_problem
from sparseserve.solvers.statistics import InputStatistics, output_error
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class PaperFista:
    """Bisection on lambda, with the published constants.

    Lambda has the unit of ``W0 X X*^T`` summed over tokens, so its first value and interval mean
    something else for every operator and calibration size; read literally, the first bisections
    annihilate the weight and the search stops after ``patience`` rounds. Where they do not, lambda
    is halved towards zero for as long as rounds improve, a thousand of them (docs/method.md);
    ``improvement_tolerance`` ends that.

    Attributes:
        warm_start: ``wanda`` as the paper does for LLaMA, or ``sparsegpt`` as it does for OPT.
        first_lambda: Where the search starts.
        upper_lambda: Upper end of the interval; the lower end is 0.
        rounding_ratio: ``xi``; above it rounding dominates the error and lambda is raised.
        patience: ``T``; rounds without improvement after which the search ends.
        iterations: ``K``; FISTA steps a round.
        step_tolerance: FISTA stops when its step is shorter (equation 6).
        interval_tolerance: Bisection stops when the interval is shorter than this share of its
            upper end.
        improvement_tolerance: A round improves if it lowers the error by more than this share of
            it; any gain counts at 0, the reading to the letter.
    """

    rows_are_independent: ClassVar[bool] = False

    warm_start: WarmStart = "wanda"
    first_lambda: float = 1e-5
    upper_lambda: float = 1e6
    rounding_ratio: float = 0.3
    patience: int = 3
    iterations: int = 20
    step_tolerance: float = 1e-6
    interval_tolerance: float = 1e-6
    improvement_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.warm_start not in (known := get_args(WarmStart)):
            raise RecipeError(
                f"fista-paper: warm_start '{self.warm_start}' is not one of {', '.join(known)}"
            )
        if not 0 < self.first_lambda < self.upper_lambda:
            raise RecipeError("fista-paper: first_lambda must lie between 0 and upper_lambda")
        if self.patience < 1 or self.iterations < 1:
            raise RecipeError("fista-paper: patience and iterations must be positive")
        if not 0 <= self.improvement_tolerance < 1:
            raise RecipeError(
                f"fista-paper: improvement_tolerance {self.improvement_tolerance:g} must be at "
                "least 0 and below 1"
            )

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Run algorithm 1; the best rounded weight by total error is returned."""
        # The damping that SparseGPT and ALPS were published with.
        start = warm_starts(0.01)[self.warm_start].prune(dense_weight, statistics, pattern)
        problem = operator_problem(dense_weight, statistics, damping=0.0)
        lipschitz = largest_eigenvalue(problem.gram)

        best = start.weight
        best_error = _total_error(best, dense_weight, statistics)
        penalty, low, high = self.first_lambda, 0.0, self.upper_lambda
        stale, products, status = 0, start.gram_products, start.status
        while stale < self.patience and high - low > self.interval_tolerance * high:
            result = fista(
                problem,
                best,
                l1=penalty,
                lipschitz=lipschitz,
                iterations=self.iterations,
                step_tolerance=self.step_tolerance,
            )
            products += result.iterations + 2  # its rounding and its total error are judged
            rounded = pattern.project(result.weight)
            error = _total_error(rounded, dense_weight, statistics)
            if _rounding_error(result.weight - rounded, problem) > self.rounding_ratio * error:
                low = penalty
            else:
                high = penalty
            improved = error < (1 - self.improvement_tolerance) * best_error
            stale = 0 if improved else stale + 1
            if error < best_error:
                best, best_error = rounded, error
                step = result.last_step / max(float(result.weight.norm()), 1e-30)
                status = SolverStatus(result.converged, step)
            penalty = (low + high) / 2
        return PrunedWeight(best, products, status)


def _total_error(weight: Tensor, dense_weight: Tensor, statistics: InputStatistics) -> float:
    """Return ``||W X* - W0 X||_F`` (equation 8)."""
    return float(output_error(weight, dense_weight, statistics).sum().sqrt())


def _rounding_error(change: Tensor, problem: OperatorProblem) -> float:
    """Return ``||(W_rounded - W) X*||_F``."""
    return float(torch.sqrt(((change @ problem.gram) * change).sum().clamp_min(0)))


# To the letter some operators take a thousand rounds, nearly all of them for nothing.
ENDING_PAPER_FISTA = PaperFista(improvement_tolerance=1e-4)
