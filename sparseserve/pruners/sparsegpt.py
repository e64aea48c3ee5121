"""SparseGPT: prune columns from left to right, each error repaired by the columns still to come.

Frantar and Alistarh 2023, "SparseGPT: Massive language models can be accurately pruned in
one-shot", algorithm 1 and section 3.4 (semi-structured sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.linalg import upper_inverse_factor
from sparseserve.solvers.problem import damped_gram, finite_weight, pull_of
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern

_NEAR_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class SparseGPT:
    """The optimal-brain-surgeon sweep.

    Attributes:
        damping: Share of the mean diagonal that is added to the diagonal of the Gram matrix.
        block_size: Columns updated together before the rest of the matrix is; for unstructured
            patterns also the width in which the mask is chosen.
    """

    rows_are_independent: ClassVar[bool] = True

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not self.damping > 0 or self.block_size < 1:
            raise RecipeError(
                f"sparsegpt: damping {self.damping} and block_size {self.block_size} "
                "must be positive"
            )

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Sweep once.

        The sweep repairs errors against the weight it starts from. With error correction that is
        the unconstrained minimiser ``B G^-1`` of ``||W X* - W0 X||``, from which the distance in
        the norm of ``G`` is the corrected objective itself; without, it is the dense weight.
        """
        factor = upper_inverse_factor(damped_gram(statistics, self.damping))
        weight = finite_weight(dense_weight).clone()
        if (pull := pull_of(dense_weight, statistics)) is not None:
            weight += pull @ factor.T @ factor
        columns = weight.shape[1]
        chosen = pattern.selection_columns or self.block_size
        block = max(self.block_size // chosen, 1) * chosen
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            errors = self._prune_block(
                weight[:, start:stop], factor[start:stop, start:stop], pattern
            )
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        return PrunedWeight(weight, 1)

    @staticmethod
    def _prune_block(weight: Tensor, factor: Tensor, pattern: SparsityPattern) -> Tensor:
        """Prune the columns of one block in place; return their scaled errors ``[out, block]``."""
        columns = weight.T.contiguous()  # column after column in memory, as they are gone through
        width = len(columns)
        chosen = pattern.selection_columns or width
        # Errors spread at once to the few columns that come next, and to the others together.
        near = min(max(_NEAR_COLUMNS // chosen, 1) * chosen, width)
        pivots = factor.diagonal()[:, None]
        errors = torch.empty_like(columns)
        for first in range(0, width, near):
            stop = min(first + near, width)
            for column in range(first, stop):
                if column % chosen == 0:
                    span = slice(column, column + chosen)
                    mask = pattern.best_mask((columns[span] / pivots[span]).square().T).T
                kept = columns[column].where(mask[column % chosen], 0)
                errors[column] = (columns[column] - kept) / pivots[column]
                columns[column] = kept
                columns[column + 1 : stop].addr_(
                    factor[column, column + 1 : stop], errors[column], alpha=-1
                )
            columns[stop:].addmm_(factor[first:stop, stop:].T, errors[first:stop], alpha=-1)
        weight.copy_(columns.T)
        return errors.T
