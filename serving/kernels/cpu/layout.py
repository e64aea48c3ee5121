"""The packed forms that the processor's kernels read: panels of 32 rows, made for the vector unit.

A 2:4 panel is a sequence of blocks of 32 columns. A block holds, for each of the 32 rows, one
32-bit word with the positions of its eight groups (the four index bytes of ``packed24``, as they
are), then group after group the two kept values of each row: 1.125 bytes for a dense weight in a
16-bit type, 2.125 in float32. A panel of a dense weight holds two columns after two columns of all
32 rows. In bfloat16 the two values of a row lie side by side, so that a shift and a mask make
float32 of them; in other types all first values come before all second ones.

Rows and columns are filled up with zeros. The tensor is as wide as it is read, and its dtype says
in what its values are stored; its positions are of course no numbers of that dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve.checkpoint.packed24 import Packed24

PANEL_ROWS = 32
BLOCK_COLUMNS = 32
#: Two columns of a dense panel.
PAIR_VALUES = 2 * PANEL_ROWS

_INDEX_BYTES = BLOCK_COLUMNS // 8
_GROUPS = BLOCK_COLUMNS // 4
# Positions 0 and 1 of two groups, for columns that are not there.
_NO_VALUES = 0x44


def two_four_panels(packed: Packed24, stored: torch.dtype) -> Tensor:
    """Return the panels of a 2:4 weight, ``[panels, blocks, values]`` in the dtype ``stored``.

    Args:
        packed: The weight ``[rows, columns]``.
        stored: bfloat16, float16 or float32; must hold every value.
    """
    rows, columns = packed.values.shape[0], packed.values.shape[1] * 2
    extra_rows, extra_columns = -rows % PANEL_ROWS, -columns % BLOCK_COLUMNS
    values = pad(packed.values.to(stored), (0, extra_columns // 2, 0, extra_rows))
    blocks = values.shape[1] // (BLOCK_COLUMNS // 2)
    missing = blocks * _INDEX_BYTES - packed.indices.shape[1]
    indices = pad(packed.indices, (0, missing, 0, extra_rows), value=_NO_VALUES)
    words = indices.view(-1, PANEL_ROWS, blocks, _INDEX_BYTES).transpose(1, 2)
    pairs = values.view(-1, PANEL_ROWS, blocks, _GROUPS, 2).permute(0, 2, 3, 1, 4)
    parts = (
        words.reshape(len(words), blocks, -1).view(stored),
        _interleaved(pairs).reshape(len(words), blocks, -1),
    )
    return torch.cat(parts, dim=-1)


def block_values(stored: torch.dtype) -> int:
    """Return the width of a block of a 2:4 panel: positions count as values of its dtype."""
    return PANEL_ROWS * (4 // stored.itemsize + BLOCK_COLUMNS // 2)


def dense_panels(weight: Tensor, stored: torch.dtype) -> Tensor:
    """Return the panels of a dense weight ``[rows, columns]``, ``[panels, pairs, values]``."""
    rows, columns = weight.shape
    extra = (0, -columns % BLOCK_COLUMNS, 0, -rows % PANEL_ROWS)
    padded = pad(weight.to(stored), extra)
    pairs = padded.view(-1, PANEL_ROWS, padded.shape[1] // 2, 2).transpose(1, 2)
    return _interleaved(pairs).reshape(*pairs.shape[:2], PAIR_VALUES)


def dense_panel_rows(panels: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return some rows of a weight in dense panels.

    Args:
        panels: Of :func:`dense_panels`.
        rows: Their numbers, ``[count]``.
        columns: Of the weight.

    Returns:
        ``[count, columns]`` in the dtype of the panels.
    """
    panel, row = rows // PANEL_ROWS, rows % PANEL_ROWS
    if panels.dtype == torch.bfloat16:
        found = panels.view(*panels.shape[:2], PANEL_ROWS, 2)[panel, :, row]
    else:
        found = panels.view(*panels.shape[:2], 2, PANEL_ROWS)[panel, :, :, row]
    return found.reshape(len(rows), -1)[:, :columns]


def _interleaved(pairs: Tensor) -> Tensor:
    """Order ``[..., 32 rows, 2]`` as the kernels read pairs of this dtype."""
    return pairs if pairs.dtype == torch.bfloat16 else pairs.transpose(-1, -2)
