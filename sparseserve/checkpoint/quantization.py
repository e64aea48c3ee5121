"""Fewer bits for the kept weights: what can be chosen, and the rounding itself.

A weight is a code times a scale. Scales are symmetric: code 0 is the weight 0, so rounding never
fills a place that was pruned. ``int8`` and ``fp8`` (float8 e4m3) have a scale for each row of the
matrix, ``int4`` one for each ``group_size`` neighbouring inputs of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.devices import DTYPES, dtype_name
from sparseserve.errors import ArtifactError, RecipeError, unknown_name

NONE, INT8 = "none", "int8"
#: The largest code of each kind; codes are as large below zero as above.
LARGEST_CODE: Mapping[str, int] = {INT8: 127, "fp8": 448, "int4": 7}
#: The kinds that can be chosen, by the values of ``--quantize``.
KINDS = (NONE, *LARGEST_CODE)
GROUP_SIZES = (128, 64, 32)
_DEFAULT_GROUP = 64
# Type and bits, as config.json calls them.
_WEIGHTS: Mapping[str, tuple[str, int]] = {
    INT8: ("int", 8),
    "fp8": ("fp8", 8),
    "int4": ("int", 4),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How kept weights are rounded.

    Attributes:
        to: ``none`` leaves them in the dtype of the model; ``int8``, ``fp8`` or ``int4``.
        group_size: int4: inputs that share a scale, 128, 64 or 32; None becomes 64. Where it does
            not divide the inputs of a matrix, the next smaller one that does is taken, or else
            the whole row.
    """

    to: str = NONE
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.to not in KINDS:
            raise RecipeError(unknown_name("quantization", self.to, KINDS))
        if self.group_size is not None and self.to != "int4":
            raise RecipeError(
                f"group_size {self.group_size} is for int4 alone, not for {self.to}: leave it out, "
                "or give --quantize int4"
            )
        if self.to == "int4" and self.group_size is None:
            object.__setattr__(self, "group_size", _DEFAULT_GROUP)
        if self.group_size not in (None, *GROUP_SIZES):
            raise RecipeError(
                f"group_size {self.group_size} must be one of "
                f"{', '.join(map(str, sorted(GROUP_SIZES)))}"
            )

    def __bool__(self) -> bool:
        """Whether anything is rounded."""
        return self.to != NONE

    @property
    def largest(self) -> int:
        """The largest code."""
        return LARGEST_CODE[self.to]

    def group_of(self, columns: int) -> int:
        """Return how many of the ``columns`` of a matrix share a scale."""
        sizes = [size for size in GROUP_SIZES if size <= (self.group_size or 0)]
        return next((size for size in sizes if columns % size == 0), columns)

    def weights_config(self, dtype: torch.dtype) -> dict[str, object]:
        """Return what config.json says under ``weights``; they are read in ``dtype``."""
        kind, bits = _WEIGHTS[self.to]
        described = {"type": kind, "bits": bits, "group_size": self.group_size}
        return {**described, "dtype": dtype_name(dtype)}

    def activations_config(self) -> dict[str, object] | None:
        """Return what it says under ``activations``: what a server rounds the inputs to."""
        if self.to == "int4":
            return None
        kind, bits = _WEIGHTS[self.to]
        return {"type": kind, "bits": bits, "dynamic": True, "strategy": "token"}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Quantization:
        """Read them from a ``quantization_config``; of version 1, which has none, nothing.

        Raises:
            ArtifactError: It holds what this release does not read.
        """
        weights = config.get("weights")
        if config.get("version") == 1:
            return cls()
        if not isinstance(weights, dict):
            raise _unreadable("weights", weights)
        if weights.get("type") == "float":
            found = cls()
        else:
            asked = (weights.get("type"), weights.get("bits"))
            named = next((name for name, row in _WEIGHTS.items() if row == asked), None)
            size = weights.get("group_size")
            if named is None or not (size is None or type(size) is int):
                raise _unreadable("weights", weights)
            try:
                found = cls(to=named, group_size=size)
            except RecipeError as error:
                raise _unreadable("weights", weights) from error
        expected = found.activations_config() if found else None
        if config.get("activations") != expected:
            raise _unreadable("activations", config.get("activations"))
        return found


def read_dtype(config: Mapping[str, object]) -> torch.dtype | None:
    """Return what code times scale is rounded to, as a ``quantization_config`` says.

    Returns:
        None where weights are not quantised.

    Raises:
        ArtifactError: It holds what this release does not read.
    """
    if not Quantization.from_config(config):
        return None
    weights = config["weights"]
    assert isinstance(weights, dict), "from_config saw that"
    name = weights.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise _unreadable("weights", weights)
    return DTYPES[name]


def scales_of(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return the scales ``[out, groups]`` in float32 by which no weight is cut off.

    Args:
        weight: ``[out, in]``.
        quantization: Not ``none``.

    Returns:
        The largest magnitude of each group over the largest code, 1 where that is zero. Those of
        int4 are bfloat16 numbers.
    """
    rows, columns = weight.shape
    group = quantization.group_of(columns)
    largest = weight.float().view(rows, columns // group, group).abs().amax(dim=-1)
    return storable_scales(largest / quantization.largest, quantization)


def storable_scales(scales: Tensor, quantization: Quantization) -> Tensor:
    """Return positive ``scales`` as they can be stored, in float32; 1 for what is zero then."""
    rounded = scales.to(scale_dtype(quantization)).float()
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def scale_dtype(quantization: Quantization) -> torch.dtype:
    """Return what scales are stored in."""
    return torch.bfloat16 if quantization.to == "int4" else torch.float32


def code_dtype(quantization: Quantization) -> torch.dtype:
    """Return what codes are computed with: int8, or float8 e4m3."""
    return torch.float8_e4m3fn if quantization.to == "fp8" else torch.int8


def codes_of(weight: Tensor, scales: Tensor, quantization: Quantization) -> Tensor:
    """Return the code of each weight, ``[out, in]`` in float32, the nearest that there is.

    Args:
        weight: ``[out, in]``.
        scales: ``[out, groups]``.
        quantization: Not ``none``.
    """
    largest = quantization.largest
    exact = (weight.float() / spread(scales, weight.shape[1])).clamp(-largest, largest)
    if quantization.to == "fp8":
        return exact.to(torch.float8_e4m3fn).float() + 0.0
    return exact.round() + 0.0


def spread(scales: Tensor, columns: int) -> Tensor:
    """Return the scale of each of ``columns`` columns, ``[out, columns]``."""
    return scales.repeat_interleave(columns // scales.shape[1], dim=1)


def rounded(weight: Tensor, scales: Tensor, quantization: Quantization) -> Tensor:
    """Return code times scale of each weight, ``[out, in]`` in float32."""
    return codes_of(weight, scales, quantization) * spread(scales, weight.shape[1])


def _unreadable(key: str, found: object) -> ArtifactError:
    return ArtifactError(
        f"quantization_config: {key} is {found!r}, which is not read here: export the checkpoint "
        "again, or install the release that wrote it"
    )
