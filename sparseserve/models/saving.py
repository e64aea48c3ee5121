"""Writing the weights of a model under the names that its checkpoint gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES
from sparseserve.errors import UnsupportedModelError, first_line


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights of ``model``, and nothing else, to ``folder`` as safetensors.

    Raises:
        UnsupportedModelError: transformers cannot save the model.
        OSError, SafetensorError: The disk is full or not writable.
    """
    _save(model, folder, None)


def save_first_rows(model: PreTrainedModel, folder: Path) -> None:
    """Do the same as ``save_weights`` with the first row of every matrix: names without bulk.

    Raises:
        UnsupportedModelError: transformers cannot save the model.
        OSError, SafetensorError: The disk is full or not writable.
    """
    # Views keep the storage of what they show, by which transformers knows tied weights.
    rows = {
        name: tensor[:1] if tensor.ndim > 1 else tensor
        for name, tensor in model.state_dict().items()
    }
    _save(model, folder, rows)


def _save(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None) -> None:
    own, config = model.generation_config, model.config
    # Both are checked when they are saved, though neither is kept here, and files that transformers
    # calls invalid are common: temperature without do_sample, for instance.
    model.generation_config = GenerationConfig()
    model.config = copy.deepcopy(config)
    model.config.save_pretrained = _save_nothing
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=DEFAULT_SHARD_BYTES)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{config.name_or_path or config.model_type}: transformers cannot save this model "
            f"({first_line(error)}): prune one that it can load and save"
        ) from error
    finally:
        model.generation_config, model.config = own, config
    (folder / "generation_config.json").unlink(missing_ok=True)


def _save_nothing(*_: object, **__: object) -> None:
    """Take the place of a configuration's ``save_pretrained``."""
