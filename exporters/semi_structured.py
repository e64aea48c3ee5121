"""``semi_structured``: the parts of torch's semi-structured tensors, ready to multiply with.

``checkpoint.semi_structured`` owns the format; docs/formats.md shows what plain torch does with it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparseserve.checkpoint import semi_structured
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES
from sparseserve.exporters.stored import export_stored


def export_semi_structured(
    artifact: Artifact,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` for torch's sparse kernels.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None keeps theirs, but makes bfloat16 of float32.
        shard_bytes: Largest size of a file.

    Raises:
        ArtifactError: The pattern is not 2:4, the artifact is damaged, the kernels know no such
            ``dtype``, a weight is too large for it, or the disk is full.
    """
    return export_stored(artifact, folder, semi_structured.FORMAT, dtype, shard_bytes=shard_bytes)
