"""``dense``: the pruned weights with their zeros in place; plain transformers loads it anywhere."""

from __future__ import annotations

from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES
from sparseserve.exporters.stored import export_stored


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
    return export_stored(artifact, folder, "dense", dtype, shard_bytes=shard_bytes)
