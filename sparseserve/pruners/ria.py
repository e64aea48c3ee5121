"""RIA: score a weight by its share of its row and of its column, and by the size of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class Ria:
    """Relative importance and activations; weights are not changed (Zhang et al., ICLR 2024).

    The score is ``(|w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij|) ||x_j||_2^a``. Shares make rows
    and columns comparable, so that none is wiped out; unstructured sparsity is therefore spread
    over the whole matrix. The paper's channel permutation is not part of it.

    Attributes:
        exponent: ``a``.
    """

    rows_are_independent: ClassVar[bool] = False

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not self.exponent >= 0:
            raise RecipeError(f"ria: exponent {self.exponent} must not be negative")

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Prune by the score; the inputs' norms come from the diagonal of the Gram matrix."""
        weight = dense_weight.float()
        size = weight.abs()
        # A row or column of zeros has nothing to share; its scores are zero.
        smallest = torch.finfo(size.dtype).tiny
        share = size / size.sum(dim=1, keepdim=True).clamp_min(smallest)
        share = share + size / size.sum(dim=0, keepdim=True).clamp_min(smallest)
        norms = statistics.gram.diagonal().sqrt().float()
        return PrunedWeight(weight.where(pattern.best_mask(share * norms**self.exponent), 0), 0)
