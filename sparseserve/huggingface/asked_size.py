"""What a config.json asks for, compared with what its files hold, before memory is taken for it.

The loader makes the model of the configuration first and compares shapes afterwards, so a few wrong
digits would fill the memory of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import UnsupportedModelError, first_line
from sparseserve.huggingface.config_values import checked_settings, layer_counts
from sparseserve.huggingface.opening import has_class, sketch_model

# Small differences are left to the loader, which names the tensor that is missing.
_FEW = 2**24
# Making a layer without memory for it takes milliseconds; so many are quick whatever they are.
_FEW_LAYERS = 128
# No form of a weight takes less than a bit.
_WEIGHTS_PER_BYTE = 8

Shapes = Mapping[str, tuple[int, ...]]


def dense_shapes(shards: Iterable[Path]) -> Shapes:
    """Return the shapes of all tensors in safetensors files, by name; of packed ones, unpacked."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # the file is no mapping
                part = shard.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return {name: packed24.dense_shape(name, *facts, found) for name, facts in found.items()}


def sketch_of(folder: Path, config: PretrainedConfig, tensors: int) -> PreTrainedModel:
    """Make the model of ``config`` without memory for its weights, within seconds.

    Args:
        folder: The model's.
        config: Of its config.json.
        tensors: How many the files hold. Every layer has one at least.

    Raises:
        UnsupportedModelError: It has more layers than the files can hold, or cannot be built.
    """
    for key, count in layer_counts(checked_settings(folder)).items():
        if count > max(tensors, _FEW_LAYERS):
            raise UnsupportedModelError(
                f"{folder}: config.json asks for {count:,} layers ({key}), its files hold "
                f"{tensors:,} tensors: the two do not belong together"
            )
    try:
        return sketch_model(config)
    except Exception as error:  # whatever the model's code raises on values that do not fit
        raise UnsupportedModelError(
            f"{folder}/config.json describes no model that can be built: {first_line(error)}"
        ) from error


def check_asked_size(folder: Path, config: PretrainedConfig, stored: Shapes) -> None:
    """Refuse a configuration that asks for far more weights than the files hold.

    Args:
        folder: The model's, for the message.
        config: What is asked for.
        stored: Shapes of the tensors in the files, unpacked.

    Raises:
        UnsupportedModelError: Names a tensor and its two shapes, or the two numbers of weights.
    """
    sketch = sketch_of(folder, config, len(stored))
    tensors = [*sketch.named_parameters(), *sketch.named_buffers()]
    asked = sum(tensor.numel() for _, tensor in tensors)
    held = sum(torch.Size(shape).numel() for shape in stored.values())
    if asked <= 2 * held + _FEW:
        return
    for name, tensor in tensors:
        if name in stored and stored[name] != tuple(tensor.shape):
            raise UnsupportedModelError(
                f"{folder}: tensor {name} is {list(stored[name])}, but config.json asks for "
                f"{list(tensor.shape)}: the two do not belong together"
            )
    raise _too_much(folder, asked, f"{held:,}")


def check_asked_bytes(folder: Path, config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse a configuration that asks for more weights than the files can hold in any form.

    A model of which transformers has no class is left to the program that has one.

    Args:
        folder: The model's, for the message.
        config: What is asked for.
        checkpoint: Its files, quantised in whatever way.

    Raises:
        UnsupportedModelError: Names the two numbers.
    """
    if not has_class(config):
        return
    sketch = sketch_of(folder, config, len(checkpoint.files))
    asked = sum(tensor.numel() for tensor in (*sketch.parameters(), *sketch.buffers()))
    if asked > _WEIGHTS_PER_BYTE * checkpoint.weight_bytes + _FEW:
        raise _too_much(folder, asked, f"{checkpoint.weight_bytes:,} bytes")


def _too_much(folder: Path, asked: int, held: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder}: config.json asks for {asked:,} weights, its files hold {held}: "
        "the two do not belong together"
    )
