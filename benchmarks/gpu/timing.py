"""Seconds of a kernel, on weights that come from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.serving.kernels import LinearKernel, LinearSpec, LoadedWeight
from sparseserve.serving.measure.latency import Spread

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

# A decoding server passes over all layers before it comes back to one, so that no weight is in the
# second-level cache when its turn comes. Copies of this many cache sizes are passed over instead.
_CACHE_SIZES = 3
_MOST_COPIES = 512
_CPU_CACHE_BYTES = 32 * 2**20
# Products in one timing, so that starting the clock and stopping it weigh little.
_FEWEST_PRODUCTS = 8


@dataclass(frozen=True, slots=True)
class Runs:
    """One kernel at one batch size.

    Attributes:
        replay: Runs products out of captured graphs, as a server does while decoding; one by one
            where there are no graphs.
        replayed: How many products.
        eager: Launches products one by one, as a server does with a long prompt.
        launched: How many products.
    """

    replay: Callable[[], object]
    replayed: int
    eager: Callable[[], object]
    launched: int


def packed_copies(
    kernel: LinearKernel, spec: LinearSpec, weight: LoadedWeight
) -> list[tuple[Tensor, ...]]:
    """Pack once and copy until the copies do not fit the cache."""
    packed = kernel.pack(weight, spec)
    size = sum(tensor.nbytes for tensor in packed)
    count = min(_MOST_COPIES, 1 + _CACHE_SIZES * _cache_bytes(spec.device) // max(size, 1))
    return [packed, *(tuple(t.clone() for t in packed) for _ in range(count - 1))]


def prepare(
    kernel: LinearKernel,
    copies: Sequence[tuple[Tensor, ...]],
    inputs: Tensor,
    rows: int,
    pool: _POOL_HANDLE | None,
) -> Runs:
    """Compile and capture what is to be timed.

    Args:
        kernel: To time.
        copies: Of :func:`packed_copies`.
        inputs: ``[batch, columns]``.
        rows: Output features.
        pool: Memory shared by all graphs, none of which is asked for its output.
    """
    runs = [partial(kernel.matmul, packed, inputs, None, rows) for packed in copies]
    few = list(islice(cycle(runs), _FEWEST_PRODUCTS))
    eager = partial(_run_all, few)
    eager()
    if inputs.device.type != "cuda":
        return Runs(eager, len(few), eager, len(few))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        # Each product is dropped when the next is made: all write to the same memory.
        _run_all(runs)
    replays = -(-_FEWEST_PRODUCTS // len(runs))
    return Runs(partial(_run_all, [graph.replay] * replays), replays * len(runs), eager, len(few))


def interleaved(runs: dict[str, Runs], repeats: int) -> dict[str, tuple[Spread, Spread]]:
    """Time all kernels in turns; returns seconds of one product, replayed and eager, by kernel."""
    replayed: dict[str, list[float]] = {name: [] for name in runs}
    eager: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            replayed[name].append(_seconds(run.replay) / run.replayed)
            eager[name].append(_seconds(run.eager) / run.launched)
    return {name: (Spread.of(replayed[name]), Spread.of(eager[name])) for name in runs}


def _run_all(runs: Sequence[Callable[[], object]]) -> None:
    for run in runs:
        run()


def _seconds(run: Callable[[], object]) -> float:
    """Seconds on the device, from its first kernel to its last, what it waits for included."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
