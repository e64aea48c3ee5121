"""Keeping weights in files while a model is loaded, so that it may be larger than memory.

transformers maps the tensors that it can use as they lie in a checkpoint. Those that it must
convert it makes in memory: another dtype, experts put together in one tensor, values that were
quantised. Here each of them is written to a file as soon as it is made, and mapped from there. The
files have no names, so their space is free again when the process ends, however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparseserve.checkpoint.tensors import writing

# Smaller tensors are not worth a file.
_SMALLEST_BYTES = 1 << 20
_LOAD_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def mapped_weights(folder: Path) -> Iterator[None]:
    """Move the large parameters that modules are given in the block to files in ``folder``.

    Raises:
        ArtifactError: The disk is full or cannot be written.
    """
    kept: set[int] = set()

    def keep(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or not _is_large_and_anonymous(parameter, kept):
            return None
        mapped = nn.Parameter(in_file(parameter.detach(), folder), parameter.requires_grad)
        mapped.__dict__.update(parameter.__dict__)  # where transformers notes what is initialised
        kept.add(mapped.data_ptr())
        return mapped

    # It takes what the hook returns, though its annotation says that this is nothing.
    handle = register_module_parameter_registration_hook(keep)  # type: ignore[arg-type]
    before = os.environ.get(_LOAD_IN_TURN)
    # Otherwise threads convert tensors faster than they can be written.
    os.environ[_LOAD_IN_TURN] = "1"
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            del os.environ[_LOAD_IN_TURN]
        else:
            os.environ[_LOAD_IN_TURN] = before


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """Return a copy of ``tensor`` whose memory is a file without a name in ``folder``.

    What is written into the copy goes to the file.

    Raises:
        ArtifactError: The disk is full or cannot be written.
    """
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is then seen here and not later
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        else:
            file.truncate(tensor.nbytes)
        pages = mmap.mmap(file.fileno(), tensor.nbytes)
    mapped = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)


def _is_large_and_anonymous(parameter: nn.Parameter, kept: set[int]) -> bool:
    on_cpu = parameter.device.type == "cpu"
    if not on_cpu or parameter.nbytes < _SMALLEST_BYTES or parameter.data_ptr() in kept:
        return False
    return not _is_mapped(parameter.data_ptr())


def _is_mapped(address: int) -> bool:
    """Whether memory belongs to a file; not known where the system does not say it."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return False
    for line in maps.splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= address < last:
            return inode != "0"
    return False
