"""``tensorrt``: an engine where TensorRT and a card are, and what builds one where they are not.

The folder always holds the ONNX graph and ``build.json``: the sizes, and the commands for another
machine. The engine's part is not yet run on hardware.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.errors import ArtifactError
from sparseserve.exporters.model_card import finish_checkpoint
from sparseserve.exporters.onnx import GRAPH_FILE, export_onnx, verify_onnx
from sparseserve.exporters.onnx.graph import input_shapes
from sparseserve.exporters.tensorrt.build import build_engine, tactics
from sparseserve.exporters.tensorrt.commands import (
    ENGINE_FILE,
    torch_tensorrt_program,
    trtexec_command,
)
from sparseserve.exporters.tensorrt.settings import (
    InputRange,
    TensorRTSettings,
    input_ranges,
)
from sparseserve.exporters.tensorrt.sparsity_log import ModuleSparsity, module_sparsity

BUILD_FILE, SPARSITY_FILE, LOG_FILE = "build.json", "sparsity.json", "build.log"

__all__ = ["TensorRTSettings", "export_tensorrt", "verify_tensorrt"]


def export_tensorrt(
    artifact: Artifact,
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    settings: TensorRTSettings | None = None,
) -> Artifact:
    """Write ``artifact`` to the new ``folder`` for TensorRT.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None is float16, which sparse tensor cores run.
        settings: The sizes; None is those of ``TensorRTSettings``.

    Raises:
        ArtifactError: The ONNX export fails, TensorRT cannot build the engine, or, where it is
            required, picked no sparse tactic.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    settings = settings or TensorRTSettings()
    require_fit("tensorrt", artifact.manifest.pattern)
    made = export_onnx(artifact, folder, dtype or torch.float16)
    kind = str(made.manifest.report["onnx"]["dtype"])
    ranges = input_ranges(input_shapes(folder), settings)
    missing = missing_for_engine(settings)
    write_json(
        folder / BUILD_FILE,
        {
            "settings": asdict(settings),
            "inputs": [asdict(item) for item in ranges],
            "trtexec": trtexec_command(GRAPH_FILE, ranges),
            "torch_tensorrt": torch_tensorrt_program(settings, kind),
            "engine": None if missing else ENGINE_FILE,
            "why_no_engine": missing,
        },
    )
    report = {**made.manifest.report, "tensorrt": {"engine": None, "why": missing}}
    if missing is None:
        found = _build(folder, artifact, settings, ranges, kind)
        counts = {
            name: sum(getattr(item, name) == "yes" for item in found)
            for name in ("eligible", "picked")
        }
        report["tensorrt"] = {"engine": ENGINE_FILE, **counts}
    manifest = replace(made.manifest, format="tensorrt", report=report, files={})
    return finish_checkpoint(folder, manifest)


def missing_for_engine(settings: TensorRTSettings) -> str | None:
    """Return what an engine cannot be built without and is not here; None if all is."""
    if find_spec("tensorrt") is None:
        return (
            "TensorRT is not installed: pip install 'sparseserve[tensorrt]' on a machine with one"
        )
    if settings.via == "torch-tensorrt" and find_spec("torch_tensorrt") is None:
        return "torch-tensorrt is not installed (pip install 'sparseserve[tensorrt]')"
    if not torch.cuda.is_available():
        return "there is no NVIDIA card that torch sees"
    return None


def verify_tensorrt(artifact: Artifact) -> None:
    """Check the graph as that of an ``onnx`` export; the engine's hash is right already.

    Raises:
        ArtifactError: Says what is wrong.
    """
    verify_onnx(artifact)
    told = read_json(artifact.path / BUILD_FILE).get("engine")
    there = ENGINE_FILE if ENGINE_FILE in artifact.manifest.files else None
    if told != there:
        raise ArtifactError(
            f"{artifact.path / BUILD_FILE}: names the engine {told!r}, the folder holds {there!r}: "
            "export it again"
        )


def _build(
    folder: Path,
    artifact: Artifact,
    settings: TensorRTSettings,
    ranges: Sequence[InputRange],
    kind: str,
) -> list[ModuleSparsity]:
    """Build and write the engine; return what TensorRT says of each pruned module."""
    trt = importlib.import_module("tensorrt")
    if settings.via == "onnx":
        built = build_engine(trt, folder / GRAPH_FILE, ranges)
        engine, log = built.engine, built.log
    else:
        from sparseserve.exporters.tensorrt.by_torch import compile_engine

        engine, log = compile_engine(artifact.path, settings, kind)
    with writing(folder / ENGINE_FILE):
        (folder / ENGINE_FILE).write_bytes(engine)
        (folder / LOG_FILE).write_text(log, encoding="utf-8")
    found = module_sparsity(log, tactics(trt, engine), artifact.manifest.pruned)
    write_json(folder / SPARSITY_FILE, {"modules": [asdict(item) for item in found]})
    if settings.require_sparse and not any(item.picked == "yes" for item in found):
        raise ArtifactError(
            f"{folder}: TensorRT picked a sparse tactic for none of {len(found)} pruned modules, "
            "because dense ones were faster or it does not say: leave out --require-sparse, or "
            "allow larger batches (--max-batch, --max-new)"
        )
    return found


def next_command(folder: Path) -> str | None:
    """Return the command that builds the engine of ``folder``; None if it has one."""
    told = json.loads((folder / BUILD_FILE).read_text(encoding="utf-8"))
    return None if told["engine"] else str(told["trtexec"])
