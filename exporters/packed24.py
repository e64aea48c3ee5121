"""``packed24``: 2:4 weights as values and 2-bit indices, 9/16 of the 16-bit size.

``checkpoint.packed24`` owns the format; docs/format.md specifies it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES
from sparseserve.exporters.stored import export_stored


def export_packed24(
    artifact: Artifact,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantization: Quantization | None = None,
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` in packed form.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None keeps theirs.
        shard_bytes: Largest size of a file.
        quantization: How to round pruned weights, each to the nearest; None keeps what was done to
            them.

    Raises:
        ArtifactError: The pattern is not 2:4, the artifact is damaged, a weight is too large for
            ``dtype``, or the disk is full.
    """
    return export_stored(
        artifact,
        folder,
        packed24.FORMAT,
        dtype,
        shard_bytes=shard_bytes,
        quantization=quantization,
    )
