"""The tensors of a checkpoint that another tool wrote, as a dense model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError
from sparseserve.foreign import bitmask24, marlin24

SCALE, ZERO = "weight_scale", "weight_zero_point"
# Scales of activations and caches: a dense model computes those in floating point.
_NOT_OF_WEIGHTS = frozenset(
    {"input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale"}
)
# Leaves that only formats have which are not read here.
_UNREADABLE = frozenset(
    {
        "weight_packed",
        "weight_shape",
        "weight_g_idx",
        "qweight",
        "qzeros",
        "g_idx",
        "weight_scale_inv",
    }
)


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """How one module's weight is stored.

    Attributes:
        name: As messages and reports call it.
        leaves: Last parts of the names of its tensors.
        read: Makes the weight of them, in the order of ``order``.
        order: Of the arguments of ``read``.
    """

    name: str
    leaves: frozenset[str]
    read: Callable[..., Tensor]
    order: tuple[str, ...]


FORMATS = (
    ForeignFormat(
        "sparse-24-bitmask",
        bitmask24.LEAVES,
        bitmask24.dense24,
        (bitmask24.VALUES, bitmask24.MASK, bitmask24.SHAPE),
    ),
    ForeignFormat(
        "marlin-24",
        marlin24.LEAVES,
        marlin24.dequantized24,
        (marlin24.CODES, marlin24.SCALES, marlin24.META),
    ),
)


@dataclass(frozen=True, slots=True)
class ForeignCheckpoint:
    """A folder that another tool wrote.

    Attributes:
        folder: Where it is.
        checkpoint: Its tensors as they are stored.
        modules: How the weights are stored that are not plain tensors, by module.
        dtype: What quantised weights are rounded to: that of config.json.
        config: The object in config.json.
    """

    folder: Path
    checkpoint: Checkpoint
    modules: Mapping[str, ForeignFormat]
    dtype: torch.dtype
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> ForeignCheckpoint:
        """Find out how each module of ``folder`` is stored; names and config.json are read.

        Raises:
            ArtifactError: A module is stored in a form that is not read here, or not whole.
        """
        checkpoint = Checkpoint.open(folder)
        leaves: dict[str, set[str]] = {}
        for name in checkpoint.files:
            module, _, leaf = name.rpartition(".")
            leaves.setdefault(module, set()).add(leaf)
        modules = {}
        for module, there in sorted(leaves.items()):
            if found := next((row for row in FORMATS if row.leaves & there - {"weight"}), None):
                if missing := sorted(found.leaves - there):
                    raise ArtifactError(
                        f"{folder}: {module} is stored as {found.name}, but its {missing[0]} is "
                        "missing: download it again"
                    )
                modules[module] = found
            elif unknown := sorted(there & _UNREADABLE):
                raise ArtifactError(
                    f"{folder}: {module}.{unknown[0]} is of a format that is not read here; dense "
                    f"weights, {' and '.join(row.name for row in FORMATS)} are"
                )
        config = read_json(folder / "config.json")
        return cls(folder, checkpoint, modules, _dtype(folder, config), config)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that any module is stored in."""
        return tuple(sorted({row.name for row in self.modules.values()})) or ("dense",)

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every matrix of the dense model by its module; other tensors are not read.

        Raises:
            ArtifactError: A weight is damaged; names its module.
        """
        for name, read in self._readers():
            module, _, leaf = name.rpartition(".")
            if module in self.modules and leaf == "weight":
                yield module, read()
            elif len(self.checkpoint.shape(name)) == 2:
                yield name.removesuffix(".weight"), read()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the dense model, in the order of names.

        Raises:
            ArtifactError: A weight is damaged; names its module.
        """
        for name, read in self._readers():
            yield name, read()

    def _readers(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Yield the names of the dense model's tensors, and what reads each."""
        for name in sorted(self.checkpoint.files):
            module, _, leaf = name.rpartition(".")
            found = self.modules.get(module)
            if found is not None and leaf in found.leaves:
                if leaf == found.order[0]:
                    yield f"{module}.weight", partial(self._weight, module, found)
            elif leaf == "weight" and f"{module}.{SCALE}" in self.checkpoint:
                yield name, partial(self._stored_codes, module)
            elif leaf not in {SCALE, ZERO, *_NOT_OF_WEIGHTS}:
                yield name, partial(self.checkpoint.tensor, name)

    def _stored_codes(self, module: str) -> Tensor:
        return self._dequantized(module, self.checkpoint.tensor(f"{module}.weight"))

    def _weight(self, module: str, found: ForeignFormat) -> Tensor:
        parts = [self.checkpoint.tensor(f"{module}.{leaf}") for leaf in found.order]
        try:
            weight = found.read(*parts)
        except ArtifactError as error:
            raise ArtifactError(f"{self.folder}: {module}: {error}") from error
        if f"{module}.{SCALE}" in self.checkpoint:
            return self._dequantized(module, weight)
        if found.name == "marlin-24":
            return weight.to(self.dtype)
        if weight.dtype.itemsize == 1:
            raise ArtifactError(
                f"{self.folder}: {module} is {weight.dtype}, but has no {SCALE}: download it again"
            )
        return weight

    def _dequantized(self, module: str, codes: Tensor) -> Tensor:
        """Return ``(code - zero) * scale``, one scale a tensor, a row, or a group of inputs."""
        scale = self.checkpoint.tensor(f"{module}.{SCALE}").float()
        values = codes.float()
        if f"{module}.{ZERO}" in self.checkpoint:
            zero = self.checkpoint.tensor(f"{module}.{ZERO}").float()
            values = values - _spread(zero, values, f"{self.folder}: {module}.{ZERO}")
        scaled = values * _spread(scale, values, f"{self.folder}: {module}.{SCALE}")
        return scaled.to(self.dtype)


def _spread(scale: Tensor, values: Tensor, name: str) -> Tensor:
    """Return a ``scale`` for each of ``values`` ``[out, in]``."""
    rows, columns = values.shape
    scale = scale.view(-1, 1) if scale.ndim < 2 else scale
    if len(scale) not in {1, rows} or columns % scale.shape[1]:
        raise ArtifactError(f"{name} {tuple(scale.shape)} does not fit a weight {rows} x {columns}")
    return scale.repeat_interleave(columns // scale.shape[1], dim=1)


def _dtype(folder: Path, config: Mapping[str, Any]) -> torch.dtype:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    named = [part.get("dtype", part.get("torch_dtype")) for part in parts]
    name = next((text for text in named if isinstance(text, str)), "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArtifactError(f"{folder}/config.json: dtype {name!r} is no floating type")
    return found
