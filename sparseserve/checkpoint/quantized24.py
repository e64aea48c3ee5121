"""2:4 weights in fewer bits: codes instead of values, and their scales (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import (
    COLUMNS_PER_BYTE,
    INDICES,
    SCALE,
    VALUES,
    Packed24,
    pack24,
    unpack24,
)
from sparseserve.checkpoint.quantization import (
    Quantization,
    code_dtype,
    codes_of,
    scale_dtype,
    scales_of,
    storable_scales,
)
from sparseserve.errors import ArtifactError

# A stored half byte is a code of int4 and this; 0 is no code.
_ZERO_NIBBLE = 8


@dataclass(frozen=True, slots=True)
class Quantized24:
    """A 2:4 weight as codes and scales.

    Attributes:
        codes: Values ``[out, in / 2]`` are codes: int8 also where four bits are stored, else
            float8 e4m3 or a wider type that holds its numbers.
        scale: float32 ``[out, groups]``; a group is ``in / groups`` neighbouring inputs of a row.
        dtype: Of the weight: what code times scale, a float32, is rounded to once.
    """

    codes: Packed24
    scale: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        rows, kept = self.codes.values.shape
        groups = self.scale.shape[-1] if self.scale.dim() == 2 else 0
        # A group of four keeps two values, which have one scale.
        whole = groups and (kept // 2) % groups == 0
        if self.scale.dtype != torch.float32 or not whole or len(self.scale) != rows:
            raise ArtifactError(
                f"scale is {self.scale.dtype} {tuple(self.scale.shape)}, which does not fit codes "
                f"{tuple(self.codes.values.shape)}"
            )

    @property
    def is_int8(self) -> bool:
        """Whether codes are int8 and each row has one scale, as int8 kernels need them."""
        return self.codes.values.dtype == torch.int8 and self.scale.shape[1] == 1

    def dequantized(self) -> Packed24:
        """Return the weight packed, its values in ``dtype``."""
        values = self.codes.values.float()
        width = values.shape[1] // self.scale.shape[1]
        exact = values * self.scale.repeat_interleave(width, dim=1)
        return Packed24((exact + 0.0).to(self.dtype), self.codes.indices)


def quantized24(
    weight: Tensor, quantization: Quantization, scale: Tensor | None = None
) -> Quantized24:
    """Round a 2:4 ``weight`` ``[out, in]`` and pack it; every rounded weight has one encoding.

    Args:
        weight: 2:4.
        quantization: Not ``none``.
        scale: float32 ``[out, groups]``; None is what cuts no weight off. A given one says that
            the weight was rounded by it already.

    Raises:
        ArtifactError: The weight is not 2:4, or not the codes of the given scale.
    """
    scales = scales_of(weight, quantization) if scale is None else scale
    codes = codes_of(weight, scales, quantization)
    packed = pack24(codes)
    scales = _without_unused(scales, codes)
    values = packed.values.to(code_dtype(quantization))
    found = Quantized24(Packed24(values, packed.indices), scales, weight.dtype)
    if scale is not None and not torch.equal(unpack24(found.dequantized()), weight):
        raise ArtifactError(f"the weight is not {quantization.to} codes times its scale")
    return found


def stored_parts(weight: Quantized24, quantization: Quantization) -> dict[str, Tensor]:
    """Return what is stored of ``weight``, by the last parts of the names."""
    values = weight.codes.values
    if quantization.to == "int4":
        nibbles = (values.to(torch.int16) + _ZERO_NIBBLE).to(torch.uint8)
        values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    scale = weight.scale.to(scale_dtype(quantization))
    return {VALUES: values, INDICES: weight.codes.indices, SCALE: scale}


def from_stored(values: Tensor, indices: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized24:
    """Return a quantised weight from the tensors that are stored of it.

    Args:
        values: int8 or float8 e4m3 ``[out, in / 2]``, or uint8 ``[out, in / 4]``, two codes a byte.
            Where a program reads float8 as a wider type, that.
        indices: As :class:`Packed24` has them.
        scale: ``[out, groups]``.
        dtype: Of the weight.

    Raises:
        ArtifactError: They do not belong together.
    """
    if values.dtype == torch.uint8:
        halves = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)
        values = halves.to(torch.int8) - _ZERO_NIBBLE
    return Quantized24(Packed24(values, indices), scale.float(), dtype)


def not_loaded(
    rows: int, columns: int, input_size: int, quantization: Quantization
) -> dict[str, Tensor]:
    """Return tensors as they are stored that no checkpoint can hold, by the last parts of names.

    Args:
        rows: Output features.
        columns: Input features, a share of ``input_size``.
        input_size: Those of the whole matrix, which say how many of them share a scale.
        quantization: Not ``none``.

    Raises:
        ArtifactError: The share cuts a group of inputs that have one scale.
    """
    group = quantization.group_of(input_size)
    whole = group == input_size
    if not whole and columns % group:
        raise ArtifactError(
            f"{columns} of {input_size} input features cut a group of {group} that share a scale"
        )
    shape = (rows, columns // (4 if quantization.to == "int4" else 2))
    if quantization.to == "fp8":
        values = torch.full(shape, torch.nan).to(torch.float8_e4m3fn)
    elif quantization.to == "int4":
        values = torch.zeros(shape, dtype=torch.uint8)
    else:
        values = torch.full(shape, -128, dtype=torch.int8)
    groups = 1 if whole else columns // group
    scale = torch.full((rows, groups), torch.nan, dtype=scale_dtype(quantization))
    indices = torch.zeros((rows, -(-columns // COLUMNS_PER_BYTE)), dtype=torch.uint8)
    return {VALUES: values, INDICES: indices, SCALE: scale}


def missing_tensor(values: Tensor, indices: Tensor, scale: Tensor) -> str | None:
    """Return which stored tensor holds what ``not_loaded`` put there; None if none does."""
    if values.is_floating_point():
        unset = values.isnan()
    elif values.dtype == torch.uint8:
        unset = (values & 15 == 0) | (values >> 4 == 0)
    else:
        unset = values == -128
    if bool(unset.any()):
        return VALUES
    if bool(scale.isnan().any()):
        return SCALE
    # Positions ascend, so the low half of a byte that was loaded is never zero.
    return INDICES if bool((indices == 0).any()) else None


def check_canonical(found: Quantized24, kind: str) -> None:
    """Make sure that codes and scales are what ``quantized24`` could have made.

    Args:
        found: The weight.
        kind: ``int8``, ``fp8`` or ``int4``.

    Raises:
        ArtifactError: A code is out of range or not where the format has it, or a scale is not a
            positive number.
    """
    codes = Packed24(found.codes.values.float(), found.codes.indices)
    quantization = Quantization(to=kind)
    if not bool((codes.values.abs() <= quantization.largest).all()):  # NaN is no code either
        raise ArtifactError(f"a code is NaN or beyond {quantization.largest}")
    dense = unpack24(codes)
    canonical = pack24(dense)
    same_bits = canonical.values.view(torch.int32).equal(codes.values.view(torch.int32))
    if not same_bits or not canonical.indices.equal(codes.indices):
        raise ArtifactError("encoding is not the canonical one")
    usable = bool(torch.isfinite(found.scale).all()) and bool((found.scale > 0).all())
    if not usable or not found.scale.equal(_without_unused(found.scale, dense)):
        raise ArtifactError("a scale is not positive and finite, or not 1 where all codes are zero")
    if not found.scale.equal(storable_scales(found.scale, quantization)):
        raise ArtifactError(f"a scale is not a {scale_dtype(quantization)} number")


def _without_unused(scales: Tensor, codes: Tensor) -> Tensor:
    """Return ``scales``, 1 for those by which only zeros are multiplied."""
    rows, groups = scales.shape
    used = (codes.view(rows, groups, -1) != 0).any(dim=-1)
    return torch.where(used, scales, torch.ones_like(scales))
