"""Which modules of a checkpoint make up a layer of vLLM, and where a rank's share may be cut."""

from __future__ import annotations

from dataclasses import dataclass

from sparseserve.checkpoint import packed24
from sparseserve.errors import ServingError
from sparseserve.sparsity import TWO_FOUR


@dataclass(frozen=True, slots=True)
class CheckpointModule:
    """A linear module by its name in the checkpoint; ``sparse`` if it is, or must be, 2:4."""

    name: str
    sparse: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows ``start`` to ``stop`` of a layer, which come from one checkpoint module."""

    name: str
    sparse: bool
    start: int
    stop: int


def shards_of(
    prefix: str, modules: tuple[CheckpointModule, ...], row_counts: list[int]
) -> tuple[Shard, ...]:
    """Return which rows of the layer ``prefix`` come from which module.

    Args:
        prefix: vLLM's name of the layer.
        modules: The checkpoint modules merged into it, in the order of their rows.
        row_counts: Rows of each part of the layer on this rank.

    Raises:
        ServingError: Only some modules are sparse and vLLM does not say which rows they have.
    """
    if len({module.sparse for module in modules}) == 1 and len(modules) != len(row_counts):
        name = modules[0].name if len(modules) == 1 else prefix
        return (Shard(name, modules[0].sparse, 0, sum(row_counts)),)
    if len(modules) != len(row_counts):
        raise ServingError(
            f"{prefix}: some of its {len(modules)} modules are packed and some not, but vLLM runs "
            f"it in {len(row_counts)} parts: prune all of them, or none with --ignore"
        )
    starts = [sum(row_counts[:index]) for index in range(len(row_counts))]
    return tuple(
        Shard(module.name, module.sparse, start, start + rows)
        for module, start, rows in zip(modules, starts, row_counts, strict=True)
    )


def require_whole_groups(prefix: str, columns: int, input_size: int) -> None:
    """Refuse a share of the input features that cuts a group of four.

    Raises:
        ServingError: Names the layer and both figures.
    """
    _require_multiple(prefix, columns, input_size, TWO_FOUR.column_multiple)


def require_whole_bytes(prefix: str, columns: int, input_size: int) -> None:
    """Refuse a share of the input features that cuts a byte of indices, which holds two groups.

    A layer that is not cut may end in half a byte.

    Raises:
        ServingError: Names the layer and both figures.
    """
    whole = columns == input_size
    multiple = TWO_FOUR.column_multiple if whole else packed24.COLUMNS_PER_BYTE
    _require_multiple(prefix, columns, input_size, multiple)


def _require_multiple(prefix: str, columns: int, input_size: int, multiple: int) -> None:
    if columns % multiple == 0:
        return
    share = f", cut into {input_size // columns}," if columns != input_size else ""
    remedy = "use a smaller --tensor-parallel-size" if share else "it cannot be 2:4"
    raise ServingError(
        f"{prefix}: {input_size} input features{share} give {columns}, "
        f"not a multiple of {multiple}: {remedy}"
    )
