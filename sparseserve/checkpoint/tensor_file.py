"""Hidden states of the calibration windows, on disk: memory must not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseserve.checkpoint.tensors import writing


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """A file of equally shaped tensors, each read from the disk when it is asked for.

    Attributes:
        path: The file, raw and in the byte order of this machine.
        shape: Of each tensor, ``[1, tokens, hidden]`` between layers.
        dtype: Of each tensor.
        skipped: How many tensors at the beginning of the file do not count.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    skipped: int = 0

    @classmethod
    def write(cls, path: Path, windows: Iterable[Tensor]) -> HiddenStates:
        """Write ``windows`` (at least one) to ``path``, never holding more than one of them.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        return cls.write_several([path], ((window,) for window in windows))[0]

    @classmethod
    def write_several(
        cls, paths: Sequence[Path], windows: Iterable[Sequence[Tensor]]
    ) -> tuple[HiddenStates, ...]:
        """Write the tensors that each of ``windows`` (at least one) has for each of ``paths``.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        kinds: list[tuple[tuple[int, ...], torch.dtype]] = []
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(writing(path))
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for window in windows:
                found = [(tuple(tensor.shape), tensor.dtype) for tensor in window]
                if kinds and found != kinds:
                    raise ValueError(f"a window of {found} among those of {kinds}")
                kinds = found
                for file, tensor in zip(files, window, strict=True):
                    file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if not kinds:
            raise ValueError("there are no hidden states to write")
        return tuple(cls(path, *kind) for path, kind in zip(paths, kinds, strict=True))

    def __len__(self) -> int:
        return self.path.stat().st_size // self._bytes - self.skipped

    def __iter__(self) -> Iterator[Tensor]:
        """Read them one after the other."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """Read a tensor; it is new and may be changed."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek((self.skipped + index) * self._bytes)
            data = bytearray(file.read(self._bytes))
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def without_first(self, count: int) -> HiddenStates:
        """Return the tensors after the first ``count``, in the same file."""
        return replace(self, skipped=self.skipped + count)

    def data(self) -> NDArray[np.uint8]:
        """Return the bytes of the tensors that count, mapped from the file."""
        return np.asarray(np.memmap(self.path, np.uint8, "r", self.skipped * self._bytes))

    def written_to(self, path: Path, data: NDArray[np.uint8]) -> HiddenStates:
        """Write what ``data`` of these returned, on whatever machine, to the file ``path``.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        with writing(path):
            data.tofile(path)
        return HiddenStates(path, self.shape, self.dtype)

    @property
    def _bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize
