"""The dtype that the config.json of a model names."""

from __future__ import annotations

from pathlib import Path

import torch

from sparseserve.checkpoint.json_file import read_json
from sparseserve.errors import ArtifactError


def config_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that the config.json in ``folder`` names; float32 if it names none.

    Raises:
        ArtifactError: There is no such file, or what it names is no floating type.
    """
    config = read_json(folder / "config.json")
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    named = [part.get("dtype", part.get("torch_dtype")) for part in parts]
    name = next((text for text in named if isinstance(text, str)), "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArtifactError(f"{folder}/config.json: dtype {name!r} is no floating type")
    return found
