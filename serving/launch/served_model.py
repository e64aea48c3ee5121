"""What a server needs to know of a checkpoint before it starts: its size, and that of its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.verification import check_before_reading
from sparseserve.errors import ArtifactError, ServingError, UnsupportedModelError
from sparseserve.paths import shown_value
from sparseserve.text import position_limit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Formats that vLLM opens, with the plugin.
SERVED_FORMATS = ("packed24", "dense")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A checkpoint folder as a server sees it.

    Attributes:
        folder: Where it is.
        weight_bytes: Size of its shards on disk.
        dense_parameters: Weights after unpacking.
        packed_parameters: Those of them that are stored packed, zeros included.
        cache_numbers_per_token: Keys and values kept for each token, all layers together.
        max_positions: The longest sequence the model takes, if it says.
        vocabulary: Number of tokens.
        dtype: Of the weights, as config.json says.
    """

    folder: Path
    weight_bytes: int
    dense_parameters: int
    packed_parameters: int
    cache_numbers_per_token: int
    max_positions: int | None
    vocabulary: int
    dtype: str

    @classmethod
    def open(cls, folder: Path, *, verified: bool = False) -> ServedModel:
        """Read the folder's config.json and the headers of its shards.

        Args:
            folder: The checkpoint.
            verified: Whether to verify all of it first; it must then be one of ours.

        Raises:
            ServingError: The folder does not hold a checkpoint that can be served.
        """
        if not folder.is_dir():
            raise ServingError(f"{folder}: no such folder: give the folder of a checkpoint")
        if not (folder / "config.json").is_file():
            raise ServingError(f"{folder}: holds no config.json, so it is not a checkpoint")
        try:
            check_before_reading(folder, verified=verified)
            _refuse_other_formats(folder)
            checkpoint = Checkpoint.open(folder)
        except ArtifactError as error:
            raise ServingError(str(error)) from error
        config = _text_config(folder, checkpoint)
        parameters = _parameters_by_tensor(checkpoint)
        return cls(
            folder=folder,
            weight_bytes=checkpoint.weight_bytes,
            dense_parameters=sum(parameters.values()),
            packed_parameters=sum(
                count
                for name, count in parameters.items()
                if f"{name.rpartition('.')[0]}.{packed24.INDICES}" in checkpoint.files
            ),
            cache_numbers_per_token=_cache_numbers_per_token(folder, config),
            max_positions=position_limit(config),
            vocabulary=_size(folder, config, "vocab_size"),
            dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        )


def _refuse_other_formats(folder: Path) -> None:
    """Refuse a checkpoint of ours that is made for other programs than vLLM.

    Raises:
        ServingError: Names its format and the remedy.
    """
    if not (folder / MANIFEST_FILE).exists():
        return
    kind = Artifact.open(folder).manifest.format
    if kind not in SERVED_FORMATS:
        raise ServingError(
            f"{folder}: vLLM serves {' and '.join(SERVED_FORMATS)} checkpoints, not {kind}: serve "
            "the checkpoint that it was made from, or export it again"
        )


def _text_config(folder: Path, checkpoint: Checkpoint) -> PretrainedConfig:
    from sparseserve.huggingface.asked_size import check_asked_bytes
    from sparseserve.huggingface.opening import open_config

    try:
        config = open_config(folder)
        check_asked_bytes(folder, config, checkpoint)
    except UnsupportedModelError as error:
        raise ServingError(str(error)) from error
    return config.get_text_config()


def _parameters_by_tensor(checkpoint: Checkpoint) -> dict[str, int]:
    """Return how many weights each stored tensor has after unpacking, zeros included."""
    counts: dict[str, int] = {}
    for file in sorted(set(checkpoint.files.values())):
        with safe_open(checkpoint.folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # a shard is not iterable
                found = shard.get_slice(name)
                shape, dtype = found.get_shape(), found.get_dtype()
                dense = packed24.dense_shape(name, shape, dtype, checkpoint.files)
                counts[name] = torch.Size(dense).numel()
    return counts


def _cache_numbers_per_token(folder: Path, config: PretrainedConfig) -> int:
    heads = _size(folder, config, "num_attention_heads")
    groups = heads
    if getattr(config, "num_key_value_heads", None) is not None:
        groups = _size(folder, config, "num_key_value_heads")
    if getattr(config, "head_dim", None) is not None:
        head_size = _size(folder, config, "head_dim")
    else:
        head_size = max(1, _size(folder, config, "hidden_size") // heads)
    return 2 * _size(folder, config, "num_hidden_layers") * groups * head_size


def _size(folder: Path, config: PretrainedConfig, key: str) -> int:
    """Return the value of ``key``.

    Raises:
        ServingError: It is no positive whole number.
    """
    value = getattr(config, key, None)
    if not isinstance(value, int) or value < 1:
        raise ServingError(
            f"{folder}: {key} in config.json is {shown_value(value)}, but must be a positive whole "
            "number: restore the original config.json"
        )
    return value
