"""DSnoT: improve a mask by exchanging weights, without training and without changing values.

Zhang et al. 2024, "Dynamic sparse no training: Training-free fine-tuning for sparse LLMs", ICLR.
In every cycle each row grows the pruned weight that best cancels its reconstruction error, and
prunes the kept weight of lowest Wanda score among those whose loss the growth pays for.

The paper estimates the error from the mean and the variance of every input. The statistics here
are second moments, which give the change of the squared error exactly, so that is used in place
of the estimate; hence no exchange raises the error. A growth that nothing pays for is not tried
again in that row. The paper leaves open what happens to values updated by the warm start; here
only its mask is taken, and the values are the dense ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.one_shot import ONE_SHOT
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.problem import OperatorProblem, operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class Dsnot:
    """Exchange weights inside a group (N:M) or a row (unstructured).

    Attributes:
        warm_start: The one-shot pruner whose mask is improved.
        cycles: Most exchanges a row; the paper's 50.
    """

    warm_start: str = "wanda"
    cycles: int = 50

    def __post_init__(self) -> None:
        if self.warm_start not in ONE_SHOT:
            raise RecipeError(
                f"dsnot: warm_start '{self.warm_start}' is not one of {', '.join(ONE_SHOT)}"
            )
        if self.cycles < 1:
            raise RecipeError(f"dsnot: cycles {self.cycles} must be positive")

    @property
    def rows_are_independent(self) -> bool:
        """Whether rows can be stacked: as for the pruner it starts from."""
        return ONE_SHOT[self.warm_start].rows_are_independent

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Return dense values on a mask that is at least as good as the warm start's, every row."""
        start = ONE_SHOT[self.warm_start].prune(dense_weight, statistics, pattern)
        problem = operator_problem(dense_weight, statistics, damping=0.0)
        mask = _exchange(problem, start.weight != 0, pattern.selection_columns, self.cycles)
        # One product for the first gradient; an exchange adds rows of the Gram matrix.
        return PrunedWeight(problem.reference.where(mask, 0), start.gram_products + 1)


def _exchange(problem: OperatorProblem, mask: Tensor, unit: int | None, cycles: int) -> Tensor:
    """Return ``mask`` ``[out, in]`` after at most ``cycles`` exchanges in every row."""
    weight, gram = problem.reference, problem.gram
    rows = torch.arange(len(weight), device=weight.device)
    columns = torch.arange(weight.shape[1], device=weight.device)
    group = columns // (unit or weight.shape[1])
    curvature = 0.5 * weight.square() * gram.diagonal()
    mask, barred = mask.clone(), torch.zeros_like(mask)
    gradient = problem.gradient(weight.where(mask, 0))
    for _ in range(cycles):
        gains = (-weight * gradient - curvature).where(~mask & ~barred, -torch.inf)
        gain, grown = gains.max(dim=1)
        growing = gain > 0
        if not bool(growing.any()):
            break
        moved = gradient + weight[rows, grown, None] * gram[grown]
        loss = curvature - weight * moved
        paid_for = mask & (group == group[grown, None]) & (loss < gain[:, None])
        # Twice the curvature is the square of Wanda's score.
        scores = curvature.where(paid_for, torch.inf)
        pruned = scores.argmin(dim=1)
        exchanged = growing & paid_for.any(dim=1)
        barred[rows, grown] |= growing & ~exchanged
        chosen = rows[exchanged]
        mask[chosen, grown[exchanged]] = True
        mask[chosen, pruned[exchanged]] = False
        after = moved - weight[rows, pruned, None] * gram[pruned]
        gradient = after.where(exchanged[:, None], gradient)
    return mask
