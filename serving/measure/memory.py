"""What an engine takes in memory once its model is loaded."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of one engine, right after its start.

    Attributes:
        tensor_bytes: Parameters and buffers of the model, each storage once.
        prepacked_bytes: Weights vLLM keeps beside them in a layout of its own, as it does with
            dense ones on a CPU; without the padding of that layout.
        cache_bytes: The cache of keys and values.
        resident_bytes: Memory of the process, libraries and the cache included, what loading
            has freed not.
        gpu_bytes: What torch holds on the GPU, the cache included; None without one.
    """

    tensor_bytes: int
    prepacked_bytes: int
    cache_bytes: int
    resident_bytes: int
    gpu_bytes: int | None

    @classmethod
    def of(cls, model: nn.Module, cache_bytes: int) -> Self:
        """Measure this process and the ``model`` in it."""
        _give_back_freed()
        return cls(
            tensor_bytes=tensor_bytes(model),
            prepacked_bytes=prepacked_bytes(model),
            cache_bytes=cache_bytes,
            resident_bytes=resident_bytes(),
            gpu_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else None,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """Read what a worker sent."""
        gpu_bytes = data["gpu_bytes"]
        return cls(
            tensor_bytes=int(str(data["tensor_bytes"])),
            prepacked_bytes=int(str(data["prepacked_bytes"])),
            cache_bytes=int(str(data["cache_bytes"])),
            resident_bytes=int(str(data["resident_bytes"])),
            gpu_bytes=None if gpu_bytes is None else int(str(gpu_bytes)),
        )

    @property
    def weight_bytes(self) -> int:
        """All weights, in whichever form they are kept."""
        return self.tensor_bytes + self.prepacked_bytes

    @property
    def bytes_without_cache(self) -> int:
        """Of the GPU, or else of the process, less the cache of keys and values."""
        whole = self.resident_bytes if self.gpu_bytes is None else self.gpu_bytes
        return whole - self.cache_bytes

    def to_json(self) -> dict[str, object]:
        """Return JSON data."""
        return {
            "weight_bytes": self.weight_bytes,
            "tensor_bytes": self.tensor_bytes,
            "prepacked_bytes": self.prepacked_bytes,
            "cache_bytes": self.cache_bytes,
            "resident_bytes": self.resident_bytes,
            "gpu_bytes": self.gpu_bytes,
            "bytes_without_cache": self.bytes_without_cache,
        }


def tensor_bytes(model: nn.Module) -> int:
    """Return the size of all parameters and buffers; tied ones count once."""
    return _storage_bytes((*model.parameters(), *model.buffers()))


def prepacked_bytes(model: nn.Module) -> int:
    """Return the size of the weights that vLLM on a CPU keeps inside a layer's ``cpu_linear``.

    The function closes over a tensor, or over the handle of a oneDNN product, which is no tensor
    but knows its shape. The weight it was made from stays behind, empty, or whole if it is tied.
    """
    total = 0
    tensors: list[Tensor] = []
    for module in model.modules():
        for held in _closed_over(getattr(module, "cpu_linear", None)):
            if isinstance(held, Tensor):
                tensors.append(held)
            elif hasattr(held, "handler_tensor"):
                rows, columns = int(getattr(held, "n", 0)), int(getattr(held, "k", 0))
                total += rows * columns * module.get_parameter("weight").element_size()
    return total + _storage_bytes(tensors)


def resident_bytes() -> int:
    """Return the memory of this process that is not swapped out."""
    status = _STATUS.read_text(encoding="utf-8") if _STATUS.is_file() else ""
    match = re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _give_back_freed() -> None:
    # The C library holds on to much of what loading freed, by chance more or less of it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _closed_over(function: object) -> Iterator[object]:
    for cell in getattr(function, "__closure__", None) or ():
        yield cell.cell_contents
