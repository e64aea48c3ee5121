"""What vLLM is told by serve, bench, evaluate and tune alike, on whatever machine they run.

On a GPU vLLM's own choices are good. On a CPU it would compile for minutes, compute in an emulated
dtype and claim almost all memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparseserve.devices import DTYPES, computes_natively, dtype_name
from sparseserve.errors import ServingError
from sparseserve.machine import Machine
from sparseserve.serving.launch.served_model import ServedModel

GIB = 2**30
#: Tokens of one block of vLLM's cache of keys and values.
BLOCK_TOKENS = 128
#: Fraction of a GPU's memory for each of two engines or servers side by side: vLLM's own check
#: counts all memory that is in use, and must pass for the second one, too.
GPU_FRACTION_OF_TWO = 0.45
# What vLLM, torch and the libraries under them take on a CPU before any weight is loaded.
_PROCESS_BYTES = 2 * GIB
# While weights are loaded, a layer exists as read and as laid out for the product, and some
# models' embeddings stay twice.
_LOADING_FACTOR = 1.25
_LARGEST_CACHE = 4 * GIB
_CACHE_FRACTION = 0.5
# Of 16 bits a weight: half of the weights, and two bits for the place of each of these.
_PACKED_FRACTION = 9 / 16
# A request of the longest kind must leave room for others.
_CONCURRENT_LONGEST = 2
_FULL_HOUSE = 64
#: vLLM keeps some blocks for itself.
SPARE_BLOCKS = 4
# Room for every dtype.
_WIDEST_NUMBER = 4


def vllm_dtype(machine: Machine, model: ServedModel, wanted: torch.dtype | None = None) -> str:
    """Return the dtype to compute in, as vLLM takes it.

    Args:
        machine: Where.
        model: What.
        wanted: What the user asked for; None is the checkpoint's own where ``machine`` computes in
            it without emulation, else float32.
    """
    if wanted is not None:
        return dtype_name(wanted)
    return "auto" if computes_natively(machine, DTYPES.get(model.dtype)) else "float32"


def runs_eagerly(machine: Machine) -> bool:
    """Whether vLLM is to run without compilation and CUDA graphs."""
    return machine.gpu is None


def cache_bytes_for(model: ServedModel, sequences: int, batch_tokens: int, longest: int) -> int:
    """Return the size of a cache that holds what is asked for and little more.

    Args:
        model: The checkpoint.
        sequences: Sequences at once.
        batch_tokens: Tokens of each of them.
        longest: Tokens of the longest sequence that is ever run, alone.
    """
    blocks = max(_blocks(longest), sequences * _blocks(batch_tokens)) + SPARE_BLOCKS
    return _WIDEST_NUMBER * model.cache_numbers_per_token * BLOCK_TOKENS * blocks


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that a server runs a model in.

    Attributes:
        tensor: How many share its weights, and the heads of its cache.
        data: How many copies of it there are.
    """

    tensor: int = 1
    data: int = 1

    @property
    def all(self) -> int:
        """All processes."""
        return self.tensor * self.data


@dataclass(frozen=True, slots=True)
class ServerCache:
    """The cache of a server on a CPU.

    Attributes:
        size: In bytes, of each rank.
        longest: The longest sequence, in tokens, of which two fit.
        only_packed: Whether the weights fit beside it only while those that are stored packed
            stay packed.
    """

    size: int
    longest: int
    only_packed: bool


def server_cache(
    model: ServedModel,
    machine: Machine,
    width: int,
    ranks: Ranks | None = None,
    *,
    can_stay_packed: bool = False,
) -> ServerCache:
    """Size the cache of a server to the memory that is free.

    Args:
        model: The checkpoint.
        machine: Where it is served.
        width: Bytes of a number.
        ranks: The processes that it runs in; None is one.
        can_stay_packed: Whether a kernel multiplies by packed weights here. Where a dense form is
            faster it is taken, so room is kept for it while there is any.

    Raises:
        ServingError: The weights alone need more memory than is free.
    """
    ranks = ranks or Ranks()
    dense = model.dense_parameters * width
    packed = dense - int(model.packed_parameters * width * (1 - _PACKED_FRACTION))
    can_stay_packed &= model.packed_parameters > 0
    for weights in (dense, packed) if can_stay_packed else (dense,):
        needed = int(weights * _LOADING_FACTOR) * ranks.data + _PROCESS_BYTES * ranks.all
        rest = (machine.free_bytes - needed) / ranks.all
        size, block = _cache_size(model, width, ranks, rest)
        if size >= _CONCURRENT_LONGEST * block:
            longest = size // block // _CONCURRENT_LONGEST * BLOCK_TOKENS
            return ServerCache(size, longest, only_packed=weights < dense)
    raise ServingError(
        f"{model.folder}: needs {needed / GIB:.1f} GiB and a cache in memory, "
        f"{machine.free_bytes / GIB:.1f} GiB are free: free some, or give --dtype bfloat16 or "
        "--kv-cache-memory-bytes after --"
    )


def _cache_size(model: ServedModel, width: int, ranks: Ranks, rest: float) -> tuple[int, int]:
    """Return what a rank's cache may take of ``rest`` bytes, and the size of its blocks."""
    block = -(-model.cache_numbers_per_token // ranks.tensor) * width * BLOCK_TOKENS
    # Of a small model, more than a full house of its longest sequences would lie idle.
    useful = _LARGEST_CACHE
    if model.max_positions is not None:
        useful = block * _blocks(model.max_positions) * _FULL_HOUSE
    return int(min(_LARGEST_CACHE, useful, rest * _CACHE_FRACTION)) // block * block, block


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
