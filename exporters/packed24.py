"""``packed24``: 2:4 weights as values and 2-bit indices, 9/16 of the 16-bit size.

The format is specified in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.artifact import Artifact, write_manifest
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES, write_checkpoint, write_json
from sparseserve.errors import ArtifactError
from sparseserve.exporters.dense import dense_tensors
from sparseserve.exporters.side_files import copy_side_files, model_config


def export_packed24(
    artifact: Artifact,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` in packed form.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None keeps theirs.
        shard_bytes: Largest size of a file.

    Raises:
        ArtifactError: The pattern is not 2:4, the artifact is damaged, a weight is too large for
            ``dtype``, or the disk is full.
    """
    require_fit(packed24.FORMAT, artifact.manifest.pattern)
    artifact.check_hashes()  # the copy gets hashes of its own: they must not vouch for damage
    write_checkpoint(folder, _packed_tensors(artifact, dtype), shard_bytes=shard_bytes)
    copy_side_files(artifact.path, folder)
    config = model_config(artifact.path, dtype)
    config["quantization_config"] = packed24.quantization_config(artifact.manifest.pruned)
    write_json(folder / "config.json", config)
    return write_manifest(folder, replace(artifact.manifest, format=packed24.FORMAT, files={}))


def load_dense_state(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint of any format as the tensors of the dense one.

    Raises:
        ArtifactError: The folder is not one of ours, or is damaged.
    """
    return dict(dense_tensors(Artifact.open(folder)))


def _packed_tensors(artifact: Artifact, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    pruned = set(artifact.manifest.pruned)
    for name, tensor in dense_tensors(artifact, dtype):
        module, _, leaf = name.rpartition(".")
        if module not in pruned or leaf != "weight":
            yield name, tensor
            continue
        try:
            stored = packed24.stored(tensor.T if module in artifact.manifest.transposed else tensor)
        except ArtifactError as error:
            raise ArtifactError(f"{artifact.path}: {module}: {error}") from error
        for suffix, part in zip(packed24.TENSORS, stored, strict=True):
            yield f"{module}.{suffix}", part
