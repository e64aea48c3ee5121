"""``dense``: the pruned weights with their zeros in place; plain transformers loads it anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import Artifact, write_manifest
from sparseserve.checkpoint.storage import storage_of
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES, write_checkpoint, write_json
from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError
from sparseserve.exporters.side_files import copy_side_files, model_config


def export_dense(
    artifact: Artifact,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` as a dense checkpoint.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None keeps theirs.
        shard_bytes: Largest size of a file.

    Raises:
        ArtifactError: The artifact is damaged, a weight is too large for ``dtype``, or the disk is
            full.
    """
    artifact.check_hashes()  # the copy gets hashes of its own: they must not vouch for damage
    write_checkpoint(folder, dense_tensors(artifact, dtype), shard_bytes=shard_bytes)
    copy_side_files(artifact.path, folder)
    config = model_config(artifact.path, dtype)
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    return write_manifest(folder, replace(artifact.manifest, format="dense", files={}))


def dense_tensors(
    artifact: Artifact, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense checkpoint by name, unpacking what is packed.

    Raises:
        ArtifactError: The artifact is damaged, or a weight is too large for ``dtype``.
    """
    checkpoint = artifact.checkpoint
    pruned = set(artifact.manifest.pruned)
    first, *others = storage_of(artifact.manifest.format).TENSORS
    for name in sorted(checkpoint.files):
        module, _, leaf = name.rpartition(".")
        if module in pruned and leaf == first:
            weight = artifact.pruned_weight(checkpoint, module)
            transposed = module in artifact.manifest.transposed
            dense = f"{module}.weight"
            yield dense, _rounded(artifact, dense, weight.T if transposed else weight, dtype)
        elif module not in pruned or leaf not in others:
            yield name, _rounded(artifact, name, checkpoint.tensor(name), dtype)


def _rounded(artifact: Artifact, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if tensor.isfinite().all() and not rounded.isfinite().all():
        largest = float(tensor.abs().max())
        kind = dtype_name(dtype)
        raise ArtifactError(
            f"{artifact.path}: {name} holds {largest:g}, more than {kind} can: "
            "choose another --dtype"
        )
    return rounded
