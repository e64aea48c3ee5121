"""Rounding the kept weights of a pruned operator, each error repaired by those still to come.

Frantar et al. 2023, "GPTQ", with a fixed mask: a place that is pruned stays zero, and what the
repair of earlier errors would have put there is an error that later weights repair in turn. Pruning
comes first and rounding second (Harma et al. 2025, "Effective interplay between sparsity and
quantization").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparseserve.checkpoint.quantization import (
    Quantization,
    rounded,
    scales_of,
    storable_scales,
)
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.solvers.linalg import upper_inverse_factor
from sparseserve.solvers.problem import damped_gram, finite_weight, pull_of
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.solvers.sweep import near_columns, sweep_block
from sparseserve.sparsity import SparsityPattern

_BLOCK = 128
# A smaller scale rounds most weights better and cuts the largest off: the best share is taken.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)


@dataclass(frozen=True, slots=True)
class QuantizeKept:
    """The sweep over columns, with the zeros of the weight as its mask.

    Attributes:
        quantization: To what; not ``none``.
        damping: Share of the mean diagonal that is added to the diagonal of the Gram matrix.
    """

    rows_are_independent: ClassVar[bool] = True

    quantization: Quantization
    damping: float = 0.01

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        """Round ``dense_weight`` ``[out, in]``, which is pruned already; its zeros stay.

        Returns:
            The rounded weight, and its scales.

        Raises:
            NumericalError: The factorisation fails or a value is not finite.
        """
        factor = upper_inverse_factor(damped_gram(statistics, self.damping))
        weight = finite_weight(dense_weight).clone()
        mask = weight != 0
        if (pull := pull_of(dense_weight, statistics)) is not None:
            weight += pull @ factor.T @ factor
        columns = weight.shape[1]
        group = self.quantization.group_of(columns)
        # Groups that fit into a block get the scale that suits them when the sweep arrives.
        late = _BLOCK % group == 0
        kept = weight * mask
        first = scales_of(kept, self.quantization)
        pivots = factor.diagonal()
        scales = first if late else _best_scales(kept, first, pivots, self.quantization)
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            own = scales[:, start // group : -(-stop // group)]
            mine = group if late else None
            settle = _Rounded(self.quantization, mask[:, start:stop].T, mine, own)
            errors = sweep_block(
                weight[:, start:stop],
                factor[start:stop, start:stop],
                settle,
                near_columns(1, stop - start),
            )
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        return PrunedWeight(weight + 0.0, 1, scales=scales)


def _best_scales(
    weight: Tensor, scales: Tensor, pivots: Tensor, quantization: Quantization
) -> Tensor:
    """Return the share of each of ``scales`` ``[out, groups]`` that loses least.

    The error of a weight counts over its pivot, as in the sweep; ``pivots`` is ``[in]``.
    """
    if quantization.to == "fp8":  # its steps grow with the weights
        return scales
    best, lowest = scales, torch.full_like(scales, torch.inf)
    for share in _SHARES:
        tried = storable_scales(share * scales, quantization)
        errors = (weight - rounded(weight, tried, quantization)) / pivots
        error = errors.square().view(*scales.shape, -1).sum(dim=-1)
        best = torch.where(error < lowest, tried, best)
        lowest = torch.minimum(error, lowest)
    return best


@dataclass(slots=True)
class _Rounded:
    """What a column becomes: its codes times their scales, and zero off the mask.

    Attributes:
        quantization: To what.
        mask: ``[width, out]``.
        group: Columns whose scales are made at the first of them; None where they are made.
        scales: ``[out, groups]`` of the block; written to.
    """

    quantization: Quantization
    mask: Tensor
    group: int | None
    scales: Tensor
    _now: Tensor = field(init=False)

    def __call__(self, columns: Tensor, pivots: Tensor, column: int) -> Tensor:
        """Return the column, rounded."""
        if self.group is None:
            self._now = self.scales
        elif column % self.group == 0:
            span = slice(column, column + self.group)
            kept = (columns[span] * self.mask[span]).T
            found = scales_of(kept, self.quantization)
            self._now = _best_scales(kept, found, pivots[span, 0], self.quantization)
            self.scales[:, column // self.group] = self._now[:, 0]
        values = rounded(columns[column][:, None], self._now, self.quantization)
        return values[:, 0] * self.mask[column]
