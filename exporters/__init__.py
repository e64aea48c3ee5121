"""The formats a pruned checkpoint can be written in; one file and one line each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import Artifact, Format
from sparseserve.exporters.dense import export_dense
from sparseserve.exporters.packed24 import export_packed24, load_dense_state

Exporter = Callable[[Artifact, Path, torch.dtype | None], Artifact]

EXPORTERS: dict[Format, Exporter] = {
    "dense": export_dense,
    "packed24": export_packed24,
}

__all__ = ["EXPORTERS", "Exporter", "export_dense", "export_packed24", "load_dense_state"]
