"""Sharded safetensors checkpoints, read and written one tensor at a time.

The layout is the Hugging Face one: ``model.safetensors``, or shards named by
``model.safetensors.index.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseserve.checkpoint.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    refuse_others,
    weight_files,
)
from sparseserve.errors import ArtifactError
from sparseserve.machine import give_back_freed_memory
from sparseserve.paths import existing_parent, shown

# A shard is in memory while it is put together.
DEFAULT_SHARD_BYTES = 10**9
_GO_ON = "make room or choose another output folder, then run the same command to go on"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder: which file holds each."""

    folder: Path
    files: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index, and the header of every shard, which must describe the file exactly.

        Raises:
            ArtifactError: There are no safetensors, a shard is missing or cut short, two shards
                hold the same tensor, the index and the shards disagree, or programs would disagree
                about which files to read.
        """
        found = weight_files(folder)
        refuse_others(found)
        files: dict[str, str] = {}
        for name in found.names:
            for key in _keys(folder / name):
                if key in files:
                    raise ArtifactError(f"{folder}: both {files[key]} and {name} hold {key}")
                files[key] = name
        if found.weight_map is not None and found.weight_map != files:
            raise _wrong_index(folder / INDEX_FILE, found.weight_map, files)
        return cls(folder, files)

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """Read the header of one file.

        Raises:
            ArtifactError: It is no safetensors file, or damaged.
        """
        return cls(path.parent, dict.fromkeys(_keys(path), path.name))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it.

        Raises:
            ArtifactError: Its file cannot be read.
        """
        path = self.folder / self.files[name]
        with _readable(path), safe_open(path, framework="pt") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor, as safetensors calls it, without reading the tensor.

        Raises:
            ArtifactError: Its file cannot be read.
        """
        path = self.folder / self.files[name]
        with _readable(path), safe_open(path, framework="pt") as shard:
            found: str = shard.get_slice(name).get_dtype()
            return found

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ArtifactError: It is not stored, or its file cannot be read.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.folder}: tensor {name} is missing")
        path = self.folder / self.files[name]
        with _readable(path), safe_open(path, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor

    def row(self, name: str, index: int) -> Tensor:
        """Read one entry along the first dimension of a tensor.

        Raises:
            ArtifactError: It is not stored, or its file cannot be read.
        """
        path = self.folder / self.files[name]
        with _readable(path), safe_open(path, framework="pt") as shard:
            row: Tensor = shard.get_slice(name)[index]
            return row

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in the order of names."""
        for name in sorted(self.files):
            yield name, self.tensor(name)

    @property
    def weight_bytes(self) -> int:
        """Size of the shards on disk, headers included."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write ``tensors`` to ``folder`` in shards of at most ``shard_bytes``, in the given order.

    At most one shard is in memory. A tensor larger than a shard gets one of its own.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_tensors(folder / f"shard-{len(written)}", shard)
        written.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(written) == 1:
        (folder / "shard-0").replace(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(written):
        name = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"shard-{number}").replace(folder / name)
        weight_map.update(dict.fromkeys(names, name))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with writing_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(contiguous, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors lets only the owner read, whatever the umask says


def write_json(path: Path, data: object, *, remedy: str = _GO_ON) -> None:
    """Write JSON, whole or not at all.

    Args:
        path: Where.
        data: What.
        remedy: What to do where it cannot be written.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    with writing_whole(path, remedy=remedy) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def partial_of(path: Path) -> Path:
    """Return the file in which ``path`` is written until it is whole."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def writing_whole(path: Path, *, remedy: str = _GO_ON) -> Iterator[Path]:
    """Give a file to write, which becomes ``path`` when the block ends; a failed one is removed.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    partial = partial_of(path)
    with writing(path, remedy=remedy):
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            # What was begun is no file of the folder: its manifest must never count it.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path, *, remedy: str = _GO_ON) -> Iterator[None]:
    """Turn the failures of a write to ``path`` into one line that ends in the ``remedy``.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(existing_parent(path.parent)).free / 2**20
        raise ArtifactError(
            f"{path}: cannot be written ({_reason(error)}; {free:,.0f} MiB free): {remedy}"
        ) from error


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse early if the disk of ``folder`` has less than ``needed_bytes`` free.

    Raises:
        ArtifactError: Names both figures.
    """
    free = shutil.disk_usage(existing_parent(folder)).free
    if free < needed_bytes:
        raise ArtifactError(
            f"{folder}: needs {needed_bytes / 2**20:,.0f} MiB, but the disk has "
            f"{free / 2**20:,.0f} MiB free: make room or choose another output folder"
        )


def _reason(error: Exception) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _wrong_index(
    index: Path, weight_map: Mapping[str, str], files: Mapping[str, str]
) -> ArtifactError:
    tensor, _ = min(weight_map.items() ^ files.items())
    told = shown(weight_map[tensor]) if tensor in weight_map else "no file"
    found = f"lies in {files[tensor]}" if tensor in files else "is in none"
    return ArtifactError(
        f"{index}: does not match the tensors in the shards: it names {told} for {shown(tensor)}, "
        f"which {found}: download the model again, or correct the index"
    )


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        give_back_freed_memory()
    yield shard


def _keys(path: Path) -> list[str]:
    if not path.is_file():
        raise ArtifactError(f"{path}: shard is missing")
    with _readable(path), safe_open(path, framework="pt") as shard:
        return list(shard.keys())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: damaged or cut short ({error}): copy or make it again"
        ) from error


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers always pass."""
    if not tensor.is_floating_point():
        return True
    # torch tells of no float8 what is finite.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(wide).all())
