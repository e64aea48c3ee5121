"""What the module of a format must know about the weight of one pruned linear."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError


class WeightStorage(Protocol):
    """Names, layout and rules of a stored weight; the dense form is always ``[out, in]``."""

    def names(self, checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
        """Return the names of the tensors in ``checkpoint`` that stand for a pruned weight."""
        ...

    def stored(self, weight: Tensor, *, transposed: bool) -> Mapping[str, Tensor]:
        """Return what is stored of ``weight``, by the last parts of the names.

        ``transposed`` says that a dense checkpoint of the model stores it ``[in, out]``.
        """
        ...

    def read_weight(self, checkpoint: Checkpoint, module: str, *, transposed: bool) -> Tensor:
        """Return the dense weight of ``module``."""
        ...

    def check_weight(self, checkpoint: Checkpoint, module: str, weight: Tensor) -> None:
        """Refuse a stored form of ``weight`` that is not the one the format prescribes."""
        ...

    def keeps_stacks(self) -> bool:
        """Whether experts stay in one tensor where a dense checkpoint of the model has them so."""
        ...

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return what weights of ``dtype`` are rounded to if nothing else is asked."""
        ...

    def quantization_config(
        self, modules: tuple[str, ...], dtype: torch.dtype
    ) -> Mapping[str, object] | None:
        """Return what config.json says of the pruned ``modules`` in ``dtype``; None for nothing."""
        ...


class QuantizedStorage(WeightStorage, Protocol):
    """What the module of a format knows besides that holds weights in fewer bits, too."""

    def stored_quantized(
        self, weight: Tensor, quantization: Quantization, scale: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return what is stored of ``weight``, rounded; ``scale`` says that it is rounded so."""
        ...

    def quantization_config(
        self,
        modules: tuple[str, ...],
        dtype: torch.dtype,
        quantization: Quantization | None = None,
    ) -> Mapping[str, object]:
        """Return what config.json says of the pruned ``modules``, in ``dtype`` when read."""
        ...

    def stored_quantization(self, checkpoint: Checkpoint) -> Quantization:
        """Return how the weights of a checkpoint are rounded."""
        ...

    def quantized_dtype(self, checkpoint: Checkpoint) -> torch.dtype | None:
        """Return what rounded weights are in when they are read; None where none are."""
        ...

    def check_quantization(self, checkpoint: Checkpoint, modules: tuple[str, ...]) -> None:
        """Refuse a module that is not rounded as the checkpoint says."""
        ...

    def stored_scales(self, checkpoint: Checkpoint, modules: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the scales of those of ``modules`` that are rounded, float32, by module."""
        ...


def storage_of(name: str) -> WeightStorage:
    """Return the module of the format ``name``.

    Raises:
        ArtifactError: It is not the format of a checkpoint.
    """
    module = FORMATS[name].storage
    if module is None:
        raise ArtifactError(
            f"{name} is made for other programs, and no checkpoint that is read here: use the one "
            "that it was made from"
        )
    return cast(WeightStorage, import_module(module))


def quantized_storage_of(name: str) -> QuantizedStorage | None:
    """Return the module of the format ``name``, if it holds weights in fewer bits, too."""
    return cast(QuantizedStorage, storage_of(name)) if FORMATS[name].quantizes else None
