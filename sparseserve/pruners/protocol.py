"""What a pruner is: a function from a dense weight and its statistics to a pruned weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class SolverStatus:
    """How the iteration behind a pruned weight ended.

    Attributes:
        converged: Whether it met its own tolerance before its iterations ran out.
        residual: What was left, a share of the size of what it should vanish against.
    """

    converged: bool
    residual: float


@dataclass(frozen=True, slots=True)
class PrunedWeight:
    """A pruned operator.

    Attributes:
        weight: ``[out, in]`` float32, +0.0 wherever it was pruned.
        gram_products: Products of an ``[out, in]`` matrix with the ``[in, in]`` Gram matrix that
            were spent: the unit of cost that does not depend on the machine.
        status: How the iteration ended; None where the method has none.
        scales: ``[out, groups]`` of a weight that was rounded to codes; None of others.
    """

    weight: Tensor
    gram_products: int
    status: SolverStatus | None = None
    scales: Tensor | None = None


class Pruner(Protocol):
    """A frozen dataclass of knobs with one method."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row's result depends on no other row, so operators of one input can be stacked.

        When an iteration over all rows stops may depend on all of them. Holds for patterns
        whose rows are independent.
        """
        ...

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Prune ``dense_weight`` ``[out, in]``; inputs are left untouched.

        Raises:
            NumericalError: A factorisation fails or a value is not finite.
        """
        ...
