"""Magnitude pruning: keep the largest weights, whatever their inputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Keep the weights of largest absolute value (Han et al. 2015, NeurIPS)."""

    rows_are_independent: ClassVar[bool] = True

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Project the weight onto the pattern; the statistics are not looked at."""
        return PrunedWeight(pattern.project(dense_weight.float()), 0)
