"""``onnx``: one graph for prompts and decoding, for onnxruntime, onnxruntime-genai and TensorRT.

docs/formats.md describes the folder. ONNX has no sparse weights: they keep their zeros, in the 2:4
pattern along the axis that TensorRT looks at.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.devices import dtype_name
from sparseserve.exporters.model_card import finish_checkpoint
from sparseserve.exporters.onnx.agreement import compare_with_model
from sparseserve.exporters.onnx.genai import genai_config
from sparseserve.exporters.onnx.graph import DATA_FILE, GRAPH_FILE, export_graph
from sparseserve.exporters.onnx.weights import checked_weights
from sparseserve.exporters.side_files import copy_side_files, model_config
from sparseserve.huggingface.checkpoint_model import open_checkpoint

__all__ = ["DATA_FILE", "GRAPH_FILE", "export_onnx", "verify_onnx"]


def export_onnx(artifact: Artifact, folder: Path, dtype: torch.dtype | None = None) -> Artifact:
    """Write ``artifact``, of any checkpoint format, to the new ``folder`` as an ONNX graph.

    The graph is compared with the model before it counts: its weights to the bit, and its logits as
    onnxruntime computes them, where that knows the dtype. The manifest's report says how they
    agree.

    Args:
        artifact: What to write.
        folder: Where.
        dtype: To round all weights to; None keeps theirs.

    Raises:
        ArtifactError: The artifact is damaged, transformers' exporter fails on the model, the graph
            does not compute what the model does, or the disk is full.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    require_fit("onnx", artifact.manifest.pattern)
    artifact.check_hashes()
    model = open_checkpoint(artifact.path, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / GRAPH_FILE):
        export_graph(model, folder, artifact.manifest.pruned)
    weights = checked_weights(folder, artifact.manifest)
    agreement = compare_with_model(folder, weights, model)
    copy_side_files(artifact.path, folder)
    kind = next(model.parameters()).dtype
    config = model_config(artifact.path, kind)
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    write_json(folder / "genai_config.json", genai_config(model))
    report = {**artifact.manifest.report, "onnx": {**asdict(agreement), "dtype": dtype_name(kind)}}
    manifest = replace(
        artifact.manifest, format="onnx", report=report, files={}, tensors=(), transposed=()
    )
    return finish_checkpoint(folder, manifest)


def verify_onnx(artifact: Artifact) -> None:
    """Check the graph and the pattern of every pruned module in it, whose hashes are right.

    Raises:
        ArtifactError: Says what is wrong.
        MissingExtraError: onnx is not installed.
    """
    require_fit("onnx", artifact.manifest.pattern)
    checked_weights(artifact.path, artifact.manifest)
