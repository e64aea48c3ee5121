"""``dense``: the pruned weights with their zeros in place; plain transformers loads it anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sparseserve.artifact import Artifact, write_manifest
from sparseserve.checkpoint import DEFAULT_SHARD_BYTES, write_checkpoint, write_json
from sparseserve.exporters.side_files import copy_side_files, model_config


def export_dense(
    artifact: Artifact, folder: Path, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` as a dense checkpoint.

    Raises:
        ArtifactError: The artifact is damaged or the disk is full.
    """
    write_checkpoint(folder, dense_tensors(artifact), shard_bytes=shard_bytes)
    copy_side_files(artifact.path, folder)
    config = model_config(artifact.path)
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    return write_manifest(folder, replace(artifact.manifest, format="dense", files={}))


def dense_tensors(artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense checkpoint by name, unpacking what is packed."""
    checkpoint = artifact.checkpoint
    pruned = set(artifact.manifest.pruned)
    for name in sorted(checkpoint.files):
        module, _, leaf = name.rpartition(".")
        if module in pruned and leaf == "weight_values":
            weight = artifact.pruned_weight(checkpoint, module)
            transposed = module in artifact.manifest.transposed
            yield f"{module}.weight", weight.T if transposed else weight
        elif module not in pruned or leaf != "weight_indices":
            yield name, checkpoint.tensor(name)
