"""How a packed24 checkpoint stores a pruned weight, quantised or not."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.packed24 import (
    INDICES,
    SCALE,
    VALUES,
    VERSION_1_VALUES,
    Packed24,
    pack24,
    quantization_config,  # noqa: F401  # as ``storage.WeightStorage`` asks for it
    unpack24,
)
from sparseserve.checkpoint.quantization import NONE, Quantization, read_dtype
from sparseserve.checkpoint.quantized24 import (
    Quantized24,
    check_canonical,
    from_stored,
    quantized24,
    stored_parts,
)
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError

# By the dtype of the stored codes, as safetensors calls it.
_KINDS = {"I8": "int8", "U8": "int4", "F8_E4M3": "fp8"}


def names(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    """Return the names under which the parts of ``module`` are stored, or should be."""
    first = f"{module}.{VERSION_1_VALUES}"
    values = first if first in checkpoint else f"{module}.{VALUES}"
    scale = f"{module}.{SCALE}"
    return (values, f"{module}.{INDICES}", *((scale,) if scale in checkpoint else ()))


def stored(weight: Tensor, *, transposed: bool = False) -> dict[str, Tensor]:
    """Return values and indices of a 2:4 ``weight``, which is ``[out, in]`` in every model.

    Raises:
        ArtifactError: ``weight`` is not 2:4; the message names the first group that is not.
    """
    packed = pack24(weight)
    return {VALUES: packed.values, INDICES: packed.indices}


def stored_quantized(
    weight: Tensor, quantization: Quantization, scale: Tensor | None
) -> dict[str, Tensor]:
    """Return codes, indices and scales of a 2:4 ``weight`` ``[out, in]``.

    Raises:
        ArtifactError: ``weight`` is not 2:4, or not what ``scale`` says that it was rounded to.
    """
    return stored_parts(quantized24(weight, quantization, scale), quantization)


def read_packed(checkpoint: Checkpoint, module: str) -> Packed24 | Quantized24:
    """Read the weight of ``module`` as it is stored.

    Raises:
        ArtifactError: A tensor is missing, or they do not belong together.
    """
    values, indices, *scale = (checkpoint.tensor(name) for name in names(checkpoint, module))
    if scale:
        return from_stored(values, indices, scale[0], torch.float32)
    if not values.is_floating_point() or values.dtype.itemsize == 1:
        raise ArtifactError(f"{module}.{VALUES} is {values.dtype}, but has no {SCALE}")
    return Packed24(values, indices)


def read_weight(checkpoint: Checkpoint, module: str, *, transposed: bool = False) -> Tensor:
    """Read the dense ``[out, in]`` weight of ``module``; a quantised one in float32.

    Raises:
        ArtifactError: A tensor is missing or damaged.
    """
    found = read_packed(checkpoint, module)
    return unpack24(found.dequantized() if isinstance(found, Quantized24) else found)


def check_weight(checkpoint: Checkpoint, module: str, weight: Tensor) -> None:
    """Make sure that ``module`` is stored in the one encoding of its dense ``weight``.

    Raises:
        ArtifactError: It is not, to the bit.
    """
    found = read_packed(checkpoint, module)
    if isinstance(found, Quantized24):
        values, *_ = names(checkpoint, module)
        check_canonical(found, _KINDS[checkpoint.dtype(values)])
        return
    canonical = pack24(weight)
    same_values = _bits(found.values).equal(_bits(canonical.values))
    if not same_values or not found.indices.equal(canonical.indices):
        raise ArtifactError("encoding is not the canonical one")


def stored_quantization(checkpoint: Checkpoint) -> Quantization:
    """Return how the packed weights of a checkpoint are rounded, as its config.json says.

    Raises:
        ArtifactError: It says nothing, or what this release does not read.
    """
    return Quantization.from_config(_config(checkpoint))


def quantized_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Return what rounded weights are in when they are read; None where none are rounded.

    Raises:
        ArtifactError: config.json says nothing, or what this release does not read.
    """
    return read_dtype(_config(checkpoint))


def check_quantization(checkpoint: Checkpoint, modules: tuple[str, ...]) -> None:
    """Make sure that ``modules`` are rounded as config.json says; headers are read, no tensors.

    Raises:
        ArtifactError: One is not; names it.
    """
    asked = stored_quantization(checkpoint)
    for module in modules:
        values, _, *scale = names(checkpoint, module)
        stored_as = checkpoint.dtype(values)
        if (_KINDS.get(stored_as, stored_as) if scale else NONE) != asked.to:
            with_scales = " with scales" if scale else ""
            raise ArtifactError(
                f"{module} is stored as {stored_as}{with_scales}, but config.json says "
                f"{asked.to}: copy or export the checkpoint again"
            )
        if asked:
            _check_scales(checkpoint, module, asked)


def _check_scales(checkpoint: Checkpoint, module: str, asked: Quantization) -> None:
    values, _, scale = names(checkpoint, module)
    rows, *width = checkpoint.shape(values) or (0,)
    if len(width) != 1:
        raise ArtifactError(f"{values} {checkpoint.shape(values)} is no matrix")
    columns = width[0] * (4 if asked.to == "int4" else 2)
    expected = (rows, columns // asked.group_of(columns))
    if checkpoint.shape(scale) != expected:
        raise ArtifactError(
            f"{scale} is {checkpoint.shape(scale)}, but {asked.to} codes of {columns} inputs need "
            f"{expected}: copy or export the checkpoint again"
        )


def stored_scales(checkpoint: Checkpoint, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the scales of those of ``modules`` that are quantised, by module."""
    names_of = {module: f"{module}.{SCALE}" for module in modules}
    return {
        module: checkpoint.tensor(name).float()
        for module, name in names_of.items()
        if name in checkpoint
    }


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    config = read_json(checkpoint.folder / "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise ArtifactError(f"{checkpoint.folder}/config.json: has no quantization_config")
    return config


def keeps_stacks() -> bool:
    """Say no: each expert has tensors of its own."""
    return False


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what weights of ``dtype`` are rounded to if nothing else is asked: nothing."""
    return dtype


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
