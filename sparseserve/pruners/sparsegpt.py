"""SparseGPT: prune columns from left to right, each error repaired by the columns still to come.

Frantar and Alistarh 2023, "SparseGPT: Massive language models can be accurately pruned in
one-shot", algorithm 1 and section 3.4 (semi-structured sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.linalg import upper_inverse_factor
from sparseserve.solvers.problem import damped_gram, finite_weight, pull_of
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.solvers.sweep import near_columns, sweep_block
from sparseserve.sparsity import SparsityPattern


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
            group = pattern.selection_columns or stop - start
            errors = sweep_block(
                weight[:, start:stop],
                factor[start:stop, start:stop],
                _Pruned(pattern, group),
                near_columns(group, stop - start),
            )
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        return PrunedWeight(weight, 1)


@dataclass(slots=True)
class _Pruned:
    """What a column becomes: zero where the mask of its group says so, which is made at its first.

    ``group`` columns share a mask.
    """

    pattern: SparsityPattern
    group: int
    mask: Tensor | None = None

    def __call__(self, columns: Tensor, pivots: Tensor, column: int) -> Tensor:
        """Return the column, pruned."""
        if self.mask is None or column % self.group == 0:
            span = slice(column, column + self.group)
            self.mask = self.pattern.best_mask((columns[span] / pivots[span]).square().T).T
        return columns[column].where(self.mask[column % self.group], 0)
