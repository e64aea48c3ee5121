"""Damaged models: config.json and the index of their shards."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from benchmarks.stress.fuzz_answers import copied, put, require_same
from benchmarks.stress.mutations import Chance, mutated_text_of_json
from benchmarks.stress.plain_readings import plain_safetensors
from sparseserve.checkpoint.weight_files import INDEX_FILE
from sparseserve.machine import this_machine
from sparseserve.models.loading import load_model
from sparseserve.models.saving import stored_tensors
from sparseserve.serving.launch.command import default_options
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.testing import save_tiny_model, tiny_model, tiny_tokenizer

_FAMILIES = ("llama", "gpt2", "qwen2", "gemma3_text", "mixtral", "gpt_oss")


def prepare_models(folder: Path) -> None:
    for family in _FAMILIES:
        save_tiny_model(family, folder / "corpus" / family)


def try_config(folder: Path, chance: Chance) -> None:
    source = folder / "corpus" / chance.choice(_FAMILIES)
    made = copied(source, folder / "input")
    config = json.loads((made / "config.json").read_text())
    put(made / "config.json", mutated_text_of_json(config, chance))
    if chance.random() < 0.7:
        _require_loaded(made)
    else:
        try_serving(made)


def try_serving(folder: Path) -> None:
    model = ServedModel.open(folder)
    default_options(model, this_machine(), [], {})


def prepare_shards(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "corpus", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder / "corpus")


def try_index(folder: Path, chance: Chance) -> None:
    made = copied(folder / "corpus", folder / "input")
    index = json.loads((made / INDEX_FILE).read_text())
    put(made / INDEX_FILE, mutated_text_of_json(index, chance))
    _require_loaded(made)


def _require_loaded(folder: Path) -> None:
    """Load a model, and compare its tensors as they would be stored with those in its files."""
    loaded = load_model(folder)
    truth: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        truth |= plain_safetensors(path.read_bytes())
    found = dict(stored_tensors(loaded.model))
    truth = {name: tensor for name, tensor in truth.items() if name not in loaded.unread}
    require_same(
        found,
        {
            name: tensor.to(found[name].dtype) if name in found else tensor
            for name, tensor in truth.items()
        },
    )
