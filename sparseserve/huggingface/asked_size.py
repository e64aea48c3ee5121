"""What a config.json asks for, compared with what its files hold, before memory is taken for it.

The loader makes the model of the configuration first and compares shapes afterwards, so a few wrong
digits would fill the memory of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from sparseserve.checkpoint import packed24
from sparseserve.errors import UnsupportedModelError, first_line
from sparseserve.huggingface.opening import sketch_model

#: More decoder layers than any model has; a configuration makes lists as long as this.
MOST_LAYERS = 10_000
# Small differences are left to the loader, which names the tensor that is missing.
_FEW = 2**24
_LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?")

Shapes = Mapping[str, tuple[int, ...]]


def dense_shapes(shards: Iterable[Path]) -> Shapes:
    """Return the shapes of all tensors in safetensors files, by name; of packed ones, unpacked."""
    found: dict[str, tuple[int, ...]] = {}
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # the file is no mapping
                found[name] = tuple(shard.get_slice(name).get_shape())
    return {name: packed24.dense_shape(name, shape, found) for name, shape in found.items()}


def check_layer_counts(path: Path, settings: Mapping[str, object]) -> None:
    """Refuse numbers of layers that no model has, before transformers makes lists of that length.

    Args:
        path: Where the ``settings`` stand, for the message.
        settings: Of a config.json.

    Raises:
        UnsupportedModelError: Names the key, the value and the limit.
    """
    for key, value in _numbers(settings):
        if _LAYER_COUNT.fullmatch(key) and value > MOST_LAYERS:
            raise UnsupportedModelError(
                f"{path}: {key} is {value}, more than the {MOST_LAYERS} that are read: restore "
                "the original config.json"
            )


def check_asked_size(folder: Path, config: PretrainedConfig, stored: Shapes) -> None:
    """Refuse a configuration that asks for far more weights than the files hold.

    Args:
        folder: The model's, for the message.
        config: What is asked for.
        stored: Shapes of the tensors in the files, unpacked.

    Raises:
        UnsupportedModelError: Names a tensor and its two shapes, or the two numbers of weights.
    """
    try:
        sketch = sketch_model(config)
    except Exception as error:  # whatever the model's code raises on sizes that do not fit
        raise UnsupportedModelError(
            f"{folder}/config.json describes no model that can be built: {first_line(error)}"
        ) from error
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
    raise UnsupportedModelError(
        f"{folder}: config.json asks for {asked:,} weights, its files hold {held:,}: "
        "the two do not belong together"
    )


def _numbers(settings: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield key, value
