"""What goes with the weights: configuration, tokenizer, chat template, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.tensors import read_json, writing
from sparseserve.devices import dtype_name

_NOT_COPIED = {"config.json", MANIFEST_FILE}
_COPIED_KINDS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence, byte for byte.

    Raises:
        ArtifactError: The disk is full.
    """
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_KINDS or path.name.upper().startswith("LICENSE")
        if path.is_file() and wanted and not _is_weight_index(path.name):
            with writing(folder / path.name):
                shutil.copyfile(path, folder / path.name)


def _is_weight_index(name: str) -> bool:
    return name in _NOT_COPIED or name.endswith(".index.json")


def model_config(source: Path, dtype: torch.dtype | None = None) -> dict[str, object]:
    """Read ``config.json``, and say in it that the weights are in ``dtype``; None changes nothing.

    Configurations of parts of a model, such as ``text_config``, follow where they name a dtype.

    Raises:
        ArtifactError: It is missing or not JSON.
    """
    config = read_json(source / "config.json")
    if dtype is not None:
        name = dtype_name(dtype)
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            # Older releases of transformers wrote it under the second name.
            if part is config or {"dtype", "torch_dtype"} & set(part):
                part.pop("torch_dtype", None)
                part["dtype"] = name
    return config
