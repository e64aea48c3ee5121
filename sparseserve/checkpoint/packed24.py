"""The packed24 format: names, version, configuration, packing and unpacking.

docs/format.md specifies it for other programs. ``quantized24`` adds codes and scales, and
``packed24_storage`` reads, writes and checks the tensors of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparseserve.checkpoint.formats import METHOD
from sparseserve.checkpoint.quantization import Quantization, read_dtype
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR

FORMAT = "packed24"
# Version 1 named its values so. A program that does not know the format then found no weight at
# all and made one up; a ``weight`` of another shape stops it.
VERSION_1_VALUES = "weight_values"
VERSION = 2
VALUES = "weight"
INDICES = "weight_indices"
# Of quantised weights alone.
SCALE = "weight_scale"
# Sharding may cut the input features at multiples of it, so that no byte of indices is cut.
COLUMNS_PER_BYTE = 8
# Rows that are packed at once.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Packed24:
    """A 2:4 weight without its zeros (docs/format.md).

    ``values`` is ``[out, in / 2]`` in the weight's dtype; ``indices`` is uint8
    ``[out, ceil(in / 8)]``, one half byte ``first | second << 2`` a group of four.
    """

    values: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ArtifactError(f"packed values {tuple(self.values.shape)} are no matrix")
        rows, kept = self.values.shape
        expected = (rows, (kept // 2 + 1) // 2)
        if kept % 2 or tuple(self.indices.shape) != expected or self.indices.dtype != torch.uint8:
            raise ArtifactError(
                f"packed values {tuple(self.values.shape)} need uint8 indices {expected}, "
                f"not {self.indices.dtype} {tuple(self.indices.shape)}"
            )


def pack24(weight: Tensor) -> Packed24:
    """Pack a 2:4 ``weight`` ``[out, in]``; every weight has exactly one encoding.

    Raises:
        ArtifactError: ``weight`` is not 2:4; the message names the first group that is not.
    """
    whole_groups = weight.ndim == 2 and weight.shape[1] % TWO_FOUR.group == 0
    parts = [_packed_rows(rows) for rows in torch.split(weight, _ROWS)] if whole_groups else [None]
    if None in parts:
        # Of what is no matrix of whole groups, this says so itself.
        raise ArtifactError(f"weight is not 2:4 at {TWO_FOUR.first_violation(weight)}")
    values, indices = zip(*parts, strict=True)
    return Packed24(torch.cat(values), torch.cat(indices))


def _packed_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return values and indices of some rows, or None if they are not 2:4.

    What is needed on the way is larger than either.
    """
    rows, columns = weight.shape
    first, second, crowded = (table.to(weight.device) for table in _tables())
    # The non-zeros of a group as four bits, from the four bytes that say of each whether it is one.
    bytes_of_groups = (weight != 0).contiguous().view(torch.int32)
    groups = (
        bytes_of_groups | bytes_of_groups >> 7 | bytes_of_groups >> 14 | bytes_of_groups >> 21
    ) & 15
    if bool(crowded[groups].any()):
        return None
    places = torch.stack((first[groups], second[groups]), dim=-1)
    kept = weight.reshape(rows, -1, 4).gather(-1, places.to(torch.int64))
    values = (kept + 0.0).to(weight.dtype).reshape(rows, columns // 2)
    nibbles = places[..., 0] | places[..., 1] << 2
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4


@cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Return by a group's non-zeros, as bits, where its stored values lie and if it has too many.

    Non-zeros come first, then the lowest free places; the two are put in ascending order. Each
    table is ``[16]``, on the processor whatever the default device of the moment is.
    """
    kept = [
        sorted(sorted(range(4), key=lambda place: (not bits >> place & 1, place))[:2])
        for bits in range(16)
    ]
    first, second = torch.tensor(kept, dtype=torch.uint8, device="cpu").T.contiguous()
    crowded = [bits.bit_count() > TWO_FOUR.keep for bits in range(16)]
    return first, second, torch.tensor(crowded, device="cpu")


def unpack24(packed: Packed24) -> Tensor:
    """Return the dense ``[out, in]`` weight, with +0.0 at every pruned place.

    Raises:
        ArtifactError: the positions of a group do not ascend, or padding bits are set.
    """
    rows, kept = packed.values.shape
    dense = packed.values.new_zeros(rows, kept // 2, 4)
    positions = kept_positions(packed).to(torch.int64)
    dense.scatter_(-1, positions, packed.values.reshape(rows, kept // 2, 2))
    return dense.reshape(rows, kept * 2)


def kept_positions(packed: Packed24) -> Tensor:
    """Return where the values of each group lie, ``[out, in / 4, 2]`` from 0 to 3, ascending.

    Raises:
        ArtifactError: the positions of a group do not ascend, or padding bits are set.
    """
    rows, kept = packed.values.shape
    groups = kept // 2
    nibbles = torch.stack((packed.indices & 15, packed.indices >> 4), dim=-1).reshape(rows, -1)
    first, second = nibbles[:, :groups] & 3, nibbles[:, :groups] >> 2
    if not bool((first < second).all()):
        row, group = (first >= second).nonzero()[0].tolist()
        raise ArtifactError(f"indices at row {row}, group {group} do not ascend")
    if bool(nibbles[:, groups:].any()):
        raise ArtifactError("the padding half byte of the last group is not zero")
    return torch.stack((first, second), dim=-1)


def quantization_config(
    modules: Sequence[str], dtype: torch.dtype, quantization: Quantization | None = None
) -> dict[str, object]:
    """Return what config.json says under ``quantization_config``; ``dtype`` is that of weights."""
    floating = {"type": "float", "bits": 8 * dtype.itemsize, "group_size": None}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "format": FORMAT,
        "pattern": str(TWO_FOUR),
        "modules": list(modules),
        "weights": quantization.weights_config(dtype) if quantization else floating,
        "activations": quantization.activations_config() if quantization else None,
    }


def packed_modules(
    config: Mapping[str, object], formats: Sequence[str] = (FORMAT,)
) -> frozenset[str]:
    """Return the packed modules that a checkpoint's ``quantization_config`` lists.

    Args:
        config: The ``quantization_config``.
        formats: What the caller can read.

    Raises:
        ArtifactError: A key is missing or has a value that this release does not read.
    """
    readable = {"version": (1, VERSION), "format": formats, "pattern": (str(TWO_FOUR),)}
    for key, values in readable.items():
        # True equals 1.
        if type(config.get(key)) is not type(values[0]) or config.get(key) not in values:
            raise _unreadable(key, config.get(key), " or ".join(map(repr, values)))
    if read_dtype(config) is not None and config.get("format") != FORMAT:
        raise _unreadable("weights", config.get("weights"), "floating-point weights")
    return module_names(config.get("modules"), "quantization_config: modules")


def module_names(value: object, where: str) -> frozenset[str]:
    """Return the names of modules in a ``value`` read from JSON.

    Raises:
        ArtifactError: It is not a list of names, or is empty; the message begins with ``where``.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ArtifactError(f"{where} is not a list of module names: export the checkpoint again")
    if wrong := [name for name in value if not isinstance(name, str)]:
        raise ArtifactError(f"{where} holds {wrong[0]!r}, which is no module name")
    return frozenset(value)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether any weight is stored packed."""
    return any(name.endswith(f".{INDICES}") for name in checkpoint.files)


def dense_shape(
    name: str, shape: Sequence[int], dtype: str, stored: Container[str]
) -> tuple[int, ...]:
    """Return the shape that the stored tensor ``name`` of ``shape`` has after unpacking.

    Args:
        name: Full name of the tensor, packed or not.
        shape: As it is stored.
        dtype: As safetensors calls it.
        stored: The names of all tensors of the checkpoint.

    Returns:
        ``shape`` of what is not packed, and nothing, ``(0,)``, for indices and scales.
    """
    module, _, leaf = name.rpartition(".")
    packed = f"{module}.{INDICES}" in stored
    if packed and leaf in {INDICES, SCALE}:
        return (0,)
    if packed and leaf in {VALUES, VERSION_1_VALUES}:
        # Codes of four bits lie in bytes, two in each.
        return (*shape[:-1], (4 if dtype == "U8" else 2) * shape[-1])
    return tuple(shape)


def not_loaded(rows: int, columns: int, dtype: torch.dtype) -> Packed24:
    """Return what no checkpoint can hold: NaN values, and indices that do not ascend."""
    return Packed24(
        torch.full((rows, columns // 2), torch.nan, dtype=dtype),
        torch.zeros((rows, -(-columns // COLUMNS_PER_BYTE)), dtype=torch.uint8),
    )


def missing_tensor(packed: Packed24) -> str | None:
    """Return which part has NaN or what ``not_loaded`` put there; None if neither."""
    if bool(packed.values.isnan().any()):
        return VALUES
    # Positions ascend, so the low half of a byte that was loaded is never zero.
    return INDICES if bool((packed.indices == 0).any()) else None


def _unreadable(key: str, found: object, readable: str) -> ArtifactError:
    return ArtifactError(
        f"quantization_config: {key} is {found!r}, what is read here is {readable}: "
        f"export it with --format {FORMAT}, or install the release that wrote it"
    )
