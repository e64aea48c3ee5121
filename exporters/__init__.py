"""Writing a pruned checkpoint in a format; one file each, found through ``checkpoint.formats``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import torch

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.exporters.dense import export_dense
from sparseserve.exporters.onnx import export_onnx
from sparseserve.exporters.packed24 import export_packed24
from sparseserve.exporters.semi_structured import export_semi_structured
from sparseserve.exporters.stored import load_dense_state
from sparseserve.exporters.tensorrt import TensorRTSettings, export_tensorrt

Exporter = Callable[[Artifact, Path, torch.dtype | None], Artifact]

EXPORTERS: dict[str, Exporter] = {name: resolve_name(row.exporter) for name, row in FORMATS.items()}

__all__ = [
    "EXPORTERS",
    "Exporter",
    "TensorRTSettings",
    "export_dense",
    "export_onnx",
    "export_packed24",
    "export_semi_structured",
    "export_tensorrt",
    "load_dense_state",
]
