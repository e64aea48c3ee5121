"""Writing a pruned model: its weights, and everything else as it came."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import Checkpoint, add_tensors, write_json, writing
from sparseserve.exporters.side_files import copy_side_files, model_config
from sparseserve.models.loading import LoadedModel


def write_model(
    loaded: LoadedModel,
    folder: Path,
    dtype: torch.dtype | None,
    save: Callable[[PreTrainedModel, Path], None],
) -> None:
    """Write the model to the new ``folder``: its weights by ``save``, all else as it came.

    Args:
        loaded: The model, and the folder it came from.
        folder: Where to.
        dtype: What the weights were asked to be in; None leaves ``config.json`` as it is.
        save: Writes the weights.

    Raises:
        ArtifactError: The disk is full, or a file that goes with the weights is missing.
        UnsupportedModelError: transformers cannot save the model.
    """
    with writing(folder):
        folder.mkdir(parents=True)
        save(loaded.model, folder)
    copy_side_files(loaded.folder, folder)
    config = folder / "config.json"
    settings = model_config(loaded.folder, dtype)
    dequantised = settings.pop("quantization_config", None) is not None
    if dtype is None and not dequantised:
        with writing(config):
            shutil.copyfile(loaded.folder / "config.json", config)
    else:
        write_json(config, settings)
    with writing(folder):
        for shard in folder.glob("*.safetensors"):
            shard.chmod(config.stat().st_mode)  # else only the owner may read


def copy_unread(loaded: LoadedModel, folder: Path) -> None:
    """Add to the model written in ``folder`` what its class left in the files, as it is there.

    Quantised tensors are left out: nothing would say any more how they are to be read.

    Raises:
        ArtifactError: The disk is full.
    """
    if not loaded.unread or read_json(loaded.folder / "config.json").get("quantization_config"):
        return
    source = Checkpoint.open(loaded.folder)
    add_tensors(folder, {name: source.tensor(name) for name in loaded.unread})
