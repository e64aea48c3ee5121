"""The sweep of the optimal brain surgeon over the columns of a weight, left to right.

Each column is settled, and its error is repaired by the columns still to come: Frantar and Alistarh
2023, "SparseGPT", algorithm 1; Frantar et al. 2023, "GPTQ", with the same factor.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_NEAR_COLUMNS = 16


class Settle(Protocol):
    """Says what a column becomes."""

    def __call__(self, columns: Tensor, pivots: Tensor, column: int) -> Tensor:
        """Return the settled values ``[out]`` of a column.

        Args:
            columns: ``[width, out]``, those of a block as they are now; earlier ones are settled.
            pivots: ``[width, 1]``, the diagonal of the factor.
            column: Which one of the block.
        """
        ...


def sweep_block(weight: Tensor, factor: Tensor, settle: Settle, near: int) -> Tensor:
    """Settle the columns of one block in place; return their scaled errors ``[out, width]``.

    Args:
        weight: ``[out, width]``.
        factor: ``[width, width]``, a diagonal block of ``upper_inverse_factor``.
        settle: What each becomes.
        near: Errors spread at once to so many columns that come next, and to the others together.
    """
    columns = weight.T.contiguous()  # column after column in memory, as they are gone through
    width = len(columns)
    pivots = factor.diagonal()[:, None]
    errors = torch.empty_like(columns)
    for first in range(0, width, near):
        stop = min(first + near, width)
        for column in range(first, stop):
            kept = settle(columns, pivots, column)
            errors[column] = (columns[column] - kept) / pivots[column]
            columns[column] = kept
            columns[column + 1 : stop].addr_(
                factor[column, column + 1 : stop], errors[column], alpha=-1
            )
        columns[stop:].addmm_(factor[first:stop, stop:].T, errors[first:stop], alpha=-1)
    weight.copy_(columns.T)
    return errors.T


def near_columns(chosen: int, width: int) -> int:
    """Return a good ``near`` where ``chosen`` neighbouring columns are settled together."""
    return min(max(_NEAR_COLUMNS // chosen, 1) * chosen, width)
