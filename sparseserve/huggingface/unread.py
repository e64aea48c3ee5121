"""Tensors of a checkpoint that its class in transformers has no place for.

Other programs use them, such as those of a layer that predicts several tokens at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedModel

from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.weight_files import weight_files

_NUMBERED = re.compile(r"(?P<list>\D+?)\.(?P<number>\d+)\.")


def unread_tensors(
    folder: Path, model: PreTrainedModel, unexpected: Collection[str]
) -> tuple[str, ...]:
    """Return the names of the tensors in ``folder`` that ``model`` has no place for.

    Args:
        folder: Where ``model`` was read from.
        model: As it was read.
        unexpected: Those that transformers reports. It says nothing of those that the class of
            the model is known to leave out.
    """
    left_out = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    own = {_after_prefix(name) for name in model.state_dict()}
    stored = {
        name
        for file in weight_files(folder).names
        for name in Checkpoint.of_file(folder / file).files
    }
    return tuple(
        name
        for name in sorted(stored)
        # Patterns are searched for, and some are part of names that are read.
        if (name in unexpected or any(pattern.search(name) for pattern in left_out))
        and _after_prefix(name) not in own
    )


def surplus_layer(model: PreTrainedModel, unread: Collection[str]) -> str | None:
    """Return an unread tensor of a layer that follows the model's last one; None if there is none.

    Then config.json asks for fewer layers than there are. Layers that the class is known to leave
    out, and as many as config.json counts beside the others, are not meant.
    """
    left_out = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    beside = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    layers: dict[str, int] = {}
    for name in model.state_dict():
        if found := _NUMBERED.match(name):
            layers[found["list"]] = max(layers.get(found["list"], 0), int(found["number"]) + 1)
    for name in unread:
        found = _NUMBERED.match(name)
        if found is None or any(pattern.search(name) for pattern in left_out):
            continue
        count = layers.get(found["list"])
        if count is not None and int(found["number"]) >= count + beside:
            return name
    return None


def _after_prefix(name: str) -> str:
    """Return ``name`` without its first part, which a checkpoint may have or not."""
    return name.partition(".")[2] or name
