"""How a dense checkpoint stores a pruned weight: as any other, with its zeros in place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.checkpoint.tensors import Checkpoint


def names(checkpoint: Checkpoint, module: str) -> tuple[str]:
    """Return the name of the weight of ``module``."""
    return (f"{module}.weight",)


def stored(weight: Tensor, *, transposed: bool) -> dict[str, Tensor]:
    """Return the weight, ``[in, out]`` where the model stores it so."""
    return {"weight": weight.T if transposed else weight}


def read_weight(checkpoint: Checkpoint, module: str, *, transposed: bool) -> Tensor:
    """Return the weight ``[out, in]``.

    Raises:
        ArtifactError: It is not stored, or its file cannot be read.
    """
    weight = checkpoint.tensor(f"{module}.weight")
    return weight.T if transposed else weight


def check_weight(checkpoint: Checkpoint, module: str, weight: Tensor) -> None:
    """Ask nothing more: every tensor is a valid dense weight."""


def keeps_stacks() -> bool:
    """Say yes: names and shapes are those of the source."""
    return True


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what weights of ``dtype`` are rounded to if nothing else is asked: nothing."""
    return dtype


def quantization_config(modules: tuple[str, ...], dtype: torch.dtype) -> None:
    """Say nothing in config.json: any program reads a dense checkpoint."""
