"""Wanda: keep the weights that move the output most, one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class Wanda:
    """Score ``|w_ij| ||x_j||_2`` and keep the best; weights are not changed (Sun et al. 2024)."""

    rows_are_independent: ClassVar[bool] = True

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Prune by the score; the inputs' norms come from the diagonal of the Gram matrix."""
        weight = dense_weight.float()
        norms = statistics.gram.diagonal().sqrt().float()
        # Outputs are compared within a row only (the paper's section 3): across rows it is worse.
        mask = pattern.per_row.best_mask(weight.abs() * norms)
        return PrunedWeight(weight.where(mask, 0), 0)
