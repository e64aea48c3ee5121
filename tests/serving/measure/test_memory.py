from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparseserve.serving.measure.memory import (
    EngineMemory,
    prepacked_bytes,
    resident_bytes,
    tensor_bytes,
)


class Prepacked(nn.Module):
    """A linear as vLLM leaves it on a CPU: no weight, and a function that holds the packed one."""

    def __init__(self, packed: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))
        self.cpu_linear: Callable[[Tensor], Tensor] = lambda x: x @ packed


def test_tied_weights_count_once_and_buffers_count() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    separate = tensor_bytes(model)
    model[1].weight = model[0].weight
    assert separate - tensor_bytes(model) == 4 * 10 * 4
    # The embedding; weight, bias, mean and variance of the norm; its counter of 8 bytes.
    assert tensor_bytes(model) == 4 * (40 + 4 * 10) + 8


def test_weights_in_a_layout_of_vllms_own_are_found_in_the_function_that_multiplies() -> None:
    layers = nn.Sequential(Prepacked(torch.zeros(6, 5)), Prepacked(torch.zeros(3, 5)))
    assert tensor_bytes(layers) == 0
    assert prepacked_bytes(layers) == 4 * (6 + 3) * 5


def test_memory_of_the_process_grows_by_what_is_held() -> None:
    before = resident_bytes()
    # Pages of a mapping of its own: an allocator may hand out memory that is resident already.
    with mmap.mmap(-1, 2**26) as held:
        held.write(b"1" * len(held))
        assert resident_bytes() - before >= 0.9 * len(held)


def test_an_engines_memory_is_that_of_the_process_or_else_of_the_gpu_less_the_cache() -> None:
    on_cpu = EngineMemory(70, 30, cache_bytes=50, resident_bytes=400, gpu_bytes=None)
    on_gpu = EngineMemory(100, 0, cache_bytes=50, resident_bytes=400, gpu_bytes=180)
    assert (on_cpu.weight_bytes, on_cpu.bytes_without_cache) == (100, 350)
    assert (on_gpu.weight_bytes, on_gpu.bytes_without_cache) == (100, 130)
    for memory in (on_cpu, on_gpu):
        assert EngineMemory.from_json(memory.to_json()) == memory
