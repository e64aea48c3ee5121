"""How long each kernel takes for one layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sparseserve.serving.kernels.choice.plan import BATCHES, KernelTimes, batches_of
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight

# A layer's turn comes once a forward pass, when others have driven its weight out of the caches.
# Reading this many bytes drives out the largest of caches, or most of it. On a GPU it takes longer
# than launching a product from Python does, so that the launch is not part of the time: a server
# replays captured graphs.
_FLUSHING_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
_REPEATS = 5
_FEWEST_REPEATS = 3
_SECONDS_A_BATCH = 0.5


def measure(
    kernels: Mapping[str, LinearKernel], spec: LinearSpec, weight: LoadedWeight
) -> tuple[KernelTimes, ...]:
    """Time ``kernels``, all of which can run ``spec``, in turns at every batch size.

    Each run finds its weight in memory and its inputs in the cache, where the layer before left
    them. The time of a batch size is the median of its runs.
    """
    layouts: dict[str, tuple[Tensor, ...]] = {}
    for kernel in kernels.values():
        if kernel.layout not in layouts:
            layouts[kernel.layout] = kernel.pack(weight, spec)
    seconds: dict[str, dict[int, float]] = {name: {} for name in kernels}
    flush = flushing(spec.device)
    for batch in BATCHES:
        for name, median in _medians(kernels, layouts, spec, batch, flush).items():
            seconds[name][batch] = median
    return tuple(
        KernelTimes(
            kernel=name,
            layout=kernel.layout,
            packed_bytes=sum(tensor.nbytes for tensor in layouts[kernel.layout]),
            seconds=seconds[name],
        )
        for name, kernel in kernels.items()
    )


def _medians(
    kernels: Mapping[str, LinearKernel],
    layouts: Mapping[str, tuple[Tensor, ...]],
    spec: LinearSpec,
    batch: int,
    flush: Tensor,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randn(batch, spec.columns, generator=generator).to(spec.device, spec.dtype)

    turns = [
        (name, partial(kernel.matmul, layouts[kernel.layout], inputs, None, spec.rows))
        for name, kernel in kernels.items()
        if batch in batches_of(kernel)
    ]
    clock = _cuda_seconds if spec.device.type == "cuda" else _cpu_seconds
    return medians_in_turns(dict(turns), (flush, inputs), clock)


def flushing(device: torch.device) -> Tensor:
    """Return what drives the weights out of the caches of ``device`` where it is read."""
    return torch.zeros(_FLUSHING_BYTES[device.type] // 4, dtype=torch.float32, device=device)


def _cpu_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_seconds(run: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def medians_in_turns(
    runs: Mapping[str, Callable[[], object]],
    read_before: Sequence[Tensor],
    clock: Callable[[Callable[[], object]], float] = _cpu_seconds,
) -> dict[str, float]:
    """Return the median seconds of each of ``runs``, which take turns.

    Args:
        runs: By name.
        read_before: Read before each run, so that the caches hold the last and not the weights.
        clock: Takes the time of a run.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # the first run may compile or allocate
    started = time.perf_counter()
    for repeat in range(_REPEATS):
        if repeat >= _FEWEST_REPEATS and time.perf_counter() - started > _SECONDS_A_BATCH:
            break
        for name, run in runs.items():
            for tensor in read_before:
                tensor.sum()
            taken[name].append(clock(run))
    return {name: statistics.median(found) for name, found in taken.items()}
