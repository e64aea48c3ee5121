"""The dense model of a checkpoint of ours, whatever its format: one place for all who need it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import METHOD
from sparseserve.errors import ArtifactError, UnsupportedModelError
from sparseserve.huggingface.asked_size import check_asked_size, dense_shapes
from sparseserve.huggingface.opening import open_config, open_weights, quantisation_of
from sparseserve.paths import shown_value


def open_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Read the checkpoint in ``folder`` as plain transformers does.

    Args:
        folder: The checkpoint.
        dtype: Floating type of the weights; the checkpoint's own when left out.

    Returns:
        The dense model, in evaluation mode and without gradients.

    Raises:
        ArtifactError: The checkpoint is damaged or incomplete; names the tensor or module.
        UnsupportedModelError: transformers cannot build the model.
    """
    artifact = Artifact.open(folder)
    shards = sorted({folder / name for name in artifact.checkpoint.files.values()})
    config = open_config(folder)
    _check_method(artifact, config)
    check_asked_size(folder, config, dense_shapes(shards))
    try:
        opened = open_weights(folder, dtype)
    except UnsupportedModelError:
        _name_damage(artifact)
        raise
    for name in opened.missing:
        raise ArtifactError(f"{folder}: tensor {name} is missing: copy or export it again")
    for wrong in opened.mismatched:
        raise ArtifactError(
            f"{folder}: tensor {wrong.name} is {list(wrong.stored)}, but config.json asks for "
            f"{list(wrong.expected)}: copy or export it again"
        )
    return opened.model.eval().requires_grad_(False)


def _check_method(artifact: Artifact, config: PretrainedConfig) -> None:
    """Refuse a config.json that makes transformers read the weights in another way than is said."""
    kind = artifact.manifest.format
    wanted, found = None if kind == "dense" else METHOD, quantisation_of(config)
    if found != wanted:
        raise ArtifactError(
            f"{artifact.path}/config.json: quantization_config names {shown_value(found)}, but "
            f"{kind} weights are read by {shown_value(wanted)}: copy or export it again"
        )


def _name_damage(artifact: Artifact) -> None:
    """Raise what is wrong with a packed weight: transformers only says that something is."""
    checkpoint = artifact.checkpoint
    for module in artifact.manifest.pruned:
        artifact.pruned_weight(checkpoint, module)
