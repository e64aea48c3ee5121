"""How a product with a packed24 weight is cut into the programs of a Triton kernel."""

from __future__ import annotations

from dataclasses import dataclass

#: The batch sides of a tile: a tensor-core instruction takes 8 columns or more.
BATCH_TILES = (8, 16, 32, 64)
# Splitting more than this costs more to add up than it hides.
_MOST_SPLITS = 8
# Partial sums of all splits are addressed with 32 bits.
_MOST_PARTIAL_SUMS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one product is cut.

    Attributes:
        batch: Inputs of a tile; a power of two of at least 8, or 1 to do without tensor cores.
        rows: Output features of a tile; a power of two, of at least 16 for tensor cores.
        columns: Input features read at a time; a power of two of at least 32.
        splits: Programs that share the input features of a tile; their sums are added in order.
        warps: Warps of a program.
        stages: Tiles in flight between memory and the tensor cores; a split has as many or more.
        programs: How many a streaming multiprocessor should have, to hide the latency of memory.
    """

    batch: int
    rows: int = 64
    columns: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4
    programs: int = 2


def batch_tile(batch: int) -> int:
    """Return the smallest tile side that takes ``batch`` inputs, or the largest there is."""
    return next((side for side in BATCH_TILES if side >= batch), BATCH_TILES[-1])


def split_count(batch: int, rows: int, columns: int, *, tile: Tiling, processors: int) -> int:
    """Return how many programs should share a tile's input features.

    As many as give each of the device's ``processors`` its programs, within reason.
    """
    programs = _tiles(rows, tile.rows) * _tiles(batch, tile.batch)
    wanted = tile.programs * processors // programs
    most = min(_MOST_SPLITS, columns // (tile.stages * tile.columns))
    splits = max(1, min(most, wanted))
    return splits if splits * batch * rows <= _MOST_PARTIAL_SUMS else 1


def _tiles(size: int, side: int) -> int:
    return -(-size // side)
