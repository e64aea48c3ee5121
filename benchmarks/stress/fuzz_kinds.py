"""Kinds of input from outside: of each a corpus, and an attempt at one damaged piece of it.

An attempt ends in one of three ways. It returns: the input was accepted, and what was read is what
its bytes say, by a reading of their own that is written plainly here. It raises a
``SparseServeError``: the input was refused. Anything else is a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.stress.mutations import (
    Chance,
    mutated_bytes,
    mutated_json,
    mutated_text_of_json,
    mutated_toml,
)
from benchmarks.stress.plain_readings import plain_packed_weight, plain_safetensors, plain_texts
from sparseserve.checkpoint.artifact import (
    MANIFEST_FILE,
    Artifact,
    FileEntry,
    Manifest,
    file_sha256,
)
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.verification import verify
from sparseserve.checkpoint.weight_files import INDEX_FILE
from sparseserve.huggingface.checkpoint_model import open_checkpoint
from sparseserve.machine import this_machine
from sparseserve.models.loading import load_model
from sparseserve.models.saving import stored_tensors
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.toml import PRESETS, PUBLISHED_CORRECTIONS, UNTRAINED, load_recipe
from sparseserve.recipe.toml import named_recipe, recipe_from_mapping
from sparseserve.serving.launch.command import default_options
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.testing import save_tiny_model, tiny_model, tiny_tokenizer
from sparseserve.text import evaluation_windows, read_text
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.inspection import inspect_checkpoint
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import export, prune_and_export

_FAMILIES = ("llama", "gpt2", "qwen2", "gemma3_text", "mixtral", "gpt_oss")
_STORED_AS = {"llama": "packed24", "gpt_oss": "dense", "gpt2": "dense"}
_TEXT = "\n\n".join(f"Sentence {i} of {i * 7 % 31} words." for i in range(200))


class WrongAnswerError(Exception):
    """An input was accepted, and what was read is not what its bytes say."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of input.

    Attributes:
        name: As the table calls it.
        prepare: Writes the corpus to a folder.
        attempt: Damages a piece of the corpus in that folder, by chance, and reads it.
        share: How many of a hundred inputs are of this kind.
    """

    name: str
    prepare: Callable[[Path], None]
    attempt: Callable[[Path, Chance], None]
    share: int


def _prepare_headers(folder: Path) -> None:
    tensors = {
        "a.weight": torch.randn(4, 8),
        "b.weight": torch.randn(3, 4).bfloat16(),
        "c": torch.arange(6, dtype=torch.int64),
        "d.mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, folder / "base.safetensors", metadata={"format": "pt"})


def _try_header(folder: Path, chance: Chance) -> None:
    data = (folder / "base.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.7:
        header = mutated_text_of_json(json.loads(data[8 : 8 + length]), chance)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = mutated_bytes(data, chance)
    path = folder / "input.safetensors"
    path.write_bytes(data)
    checkpoint = Checkpoint.of_file(path)
    _require_same({name: checkpoint.tensor(name) for name in checkpoint.files}, plain_safetensors(data))
    inspect_checkpoint(path)


def _prepare_packed(folder: Path) -> None:
    _prepare_artifacts(folder, {"llama": "packed24"})


def _prepare_artifacts(
    folder: Path, stored_as: Mapping[str, str] = MappingProxyType(_STORED_AS)
) -> None:
    (folder / "text.txt").write_text(_TEXT)
    calibration = CalibrationSpec(
        source=str(folder / "text.txt"), samples=2, sequence_length=16, scrambled=0
    )
    recipe = replace(UNTRAINED, pruner=Wanda(), calibration=calibration)
    for family, kind in stored_as.items():
        source = save_tiny_model(family, folder / f"model-{family}")
        prune_and_export(Job(str(source), recipe, kind), folder / "corpus" / family)
        export(folder / "corpus" / family, folder / "dense" / family, "dense")


def _try_manifest(folder: Path, chance: Chance) -> None:
    family = chance.choice(sorted(path.name for path in (folder / "corpus").iterdir()))
    made = _copied(folder / "corpus" / family, folder / "input")
    body = json.loads((made / MANIFEST_FILE).read_text())
    changed = mutated_json(body, chance)
    if isinstance(changed, dict) and chance.random() < 0.7:
        changed = _sealed(changed)
    text = json.dumps(changed).encode()
    _replace(made / MANIFEST_FILE, mutated_bytes(text, chance) if chance.random() < 0.1 else text)
    artifact = verify(made)
    original = Artifact.open(folder / "corpus" / family)
    checkpoint, truth = artifact.checkpoint, original.checkpoint
    for module in artifact.manifest.pruned:
        found = artifact.pruned_weight(checkpoint, module)
        _require_same({module: found}, {module: original.pruned_weight(truth, module)})
    if chance.random() < 0.3:
        _require_same_export(folder, family)
        inspect_checkpoint(made)


def _require_same_export(folder: Path, family: str) -> None:
    shutil.rmtree(folder / "exported", ignore_errors=True)
    export(folder / "input", folder / "exported", "dense")
    truth = load_file(folder / "dense" / family / "model.safetensors")
    _require_same(load_file(folder / "exported" / "model.safetensors"), truth)


def _try_packed(folder: Path, chance: Chance) -> None:
    made = _copied(folder / "corpus" / "llama", folder / "input")
    data = bytearray((made / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.choice((1, 1, 2, 50))):
        data[chance.randrange(header, len(data))] ^= 1 << chance.randrange(8)
    _replace(made / "model.safetensors", bytes(data))
    _seal_files(made)
    artifact = verify(made)
    _require_packed(artifact, plain_safetensors(bytes(data)))


def _require_packed(artifact: Artifact, tensors: Mapping[str, Tensor]) -> None:
    """Compare what is read of a packed checkpoint, in two ways, with a plain reading."""
    checkpoint, model = artifact.checkpoint, open_checkpoint(artifact.path)
    for module in artifact.manifest.pruned:
        truth = plain_packed_weight(tensors, module)
        _require_same({module: artifact.pruned_weight(checkpoint, module)}, {module: truth})
        _require_same({module: model.get_parameter(f"{module}.weight")}, {module: truth})


def _prepare_models(folder: Path) -> None:
    for family in _FAMILIES:
        save_tiny_model(family, folder / "corpus" / family)


def _try_config(folder: Path, chance: Chance) -> None:
    source = folder / "corpus" / chance.choice(_FAMILIES)
    made = _copied(source, folder / "input")
    config = json.loads((made / "config.json").read_text())
    _replace(made / "config.json", mutated_text_of_json(config, chance))
    if chance.random() < 0.7:
        _require_loaded(made)
    else:
        _try_serving(made)


def _try_quantisation(folder: Path, chance: Chance) -> None:
    made = _copied(folder / "corpus" / "llama", folder / "input")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = mutated_json(config["quantization_config"], chance)
    if chance.random() < 0.2:
        method = chance.choice(("fp8", "mxfp4", "sparseserve", "gptq", "bitsandbytes", "", None))
        config["quantization_config"] = {"quant_method": method}
    _replace(made / "config.json", json.dumps(config).encode())
    _seal_files(made)
    if chance.random() < 0.2:
        _try_serving(made)
    _require_packed(Artifact.open(made), plain_safetensors((made / "model.safetensors").read_bytes()))


def _try_serving(folder: Path) -> None:
    model = ServedModel.open(folder)
    default_options(model, this_machine(), [], {})


def _prepare_shards(folder: Path) -> None:
    tiny_model("llama").save_pretrained(folder / "corpus", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder / "corpus")


def _try_index(folder: Path, chance: Chance) -> None:
    made = _copied(folder / "corpus", folder / "input")
    index = json.loads((made / INDEX_FILE).read_text())
    _replace(made / INDEX_FILE, mutated_text_of_json(index, chance))
    _require_loaded(made)


def _require_loaded(folder: Path) -> None:
    """Load a model, and compare its tensors as they would be stored with those in its files."""
    loaded = load_model(folder)
    truth = {}
    for path in folder.glob("*.safetensors"):
        truth |= plain_safetensors(path.read_bytes())
    found = dict(stored_tensors(loaded.model))
    truth = {name: tensor for name, tensor in truth.items() if name not in loaded.unread}
    _require_same(
        found, {name: tensor.to(found[name].dtype) if name in found else tensor for name, tensor in truth.items()}
    )


def _prepare_recipes(folder: Path) -> None:
    recipes = {**PRESETS, **{name: named_recipe("default", name) for name in PUBLISHED_CORRECTIONS}}
    for name, recipe in recipes.items():
        (folder / f"{name}.toml").write_text(_toml(recipe.to_json()))
        assert load_recipe(str(folder / f"{name}.toml")) == recipe


def _toml(data: Mapping[str, object]) -> str:
    plain = {key: value for key, value in data.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items() if value is not None]
    for key, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{key}]", _toml(table)]
    return "\n".join(lines)


def _try_recipe(folder: Path, chance: Chance) -> None:
    source = chance.choice(sorted(folder.glob("*.toml")))
    path = folder / "input.recipe"
    path.write_bytes(mutated_toml(source.read_text(), chance))
    recipe = load_recipe(str(path))
    if recipe_from_mapping(json.loads(json.dumps(recipe.to_json()))) != recipe:
        raise WrongAnswerError(f"{recipe} does not come back from its JSON")


def _prepare_texts(folder: Path) -> None:
    from datasets import Dataset  # noqa: PLC0415  # takes a second

    (folder / "a.txt").write_text(_TEXT)
    rows: list[dict[str, object]] = [
        {"text": f'Row {i}, "with" é.\nAnother line.', "n": i} for i in range(20)
    ]
    chats: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": f"How {i}?"}, {"role": "assistant", "content": "So."}]}
        for i in range(9)
    ]
    for name, table in (("rows", rows), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        (folder / f"{name}.json").write_text(json.dumps(table))
        Dataset.from_list(table).to_parquet(folder / f"{name}.parquet")
    Dataset.from_list(rows).to_csv(folder / "rows.csv", index=False)


def _try_text(folder: Path, chance: Chance) -> None:
    source = chance.choice(sorted(path for path in folder.iterdir() if path.stem != "input"))
    data = source.read_bytes()
    if source.suffix == ".json" and chance.random() < 0.7:
        data = mutated_text_of_json(json.loads(data), chance)
    elif source.suffix == ".jsonl" and chance.random() < 0.7:
        rows = [json.loads(line) for line in data.splitlines()]
        place = chance.randrange(len(rows))
        rows[place] = mutated_json(rows[place], chance)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        data = mutated_bytes(data, chance)
    path = folder / f"input{source.suffix}"
    path.write_bytes(data)
    found = read_text(path)
    wanted = plain_texts(source.suffix, data)
    if wanted is not None and [_plain(document) for document in found.documents] != wanted:
        raise WrongAnswerError(f"{path.name}: other documents than its bytes hold")
    evaluation_windows(tiny_tokenizer(), found, sequence_length=8, samples=2)


def _plain(document: object) -> object:
    return document if isinstance(document, str) else json.loads(str(document))


def _require_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if found.keys() != wanted.keys():
        raise WrongAnswerError(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, tensor in found.items():
        if tensor.dtype != wanted[name].dtype or tensor.shape != wanted[name].shape:
            raise WrongAnswerError(f"{name} is another tensor than its bytes say")
        if not torch.equal(tensor.nan_to_num(7), wanted[name].nan_to_num(7)):
            raise WrongAnswerError(f"{name} has other values than its bytes say")


def _copied(source: Path, target: Path) -> Path:
    """Link the files of ``source``; what is then replaced changes no original."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _sealed(body: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest's JSON with the digest that belongs to it."""
    kept = {key: value for key, value in body.items() if key != "manifest_sha256"}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return {**kept, "manifest_sha256": digest}


def _seal_files(folder: Path) -> None:
    """Make the manifest vouch for the files as they are now."""
    where = folder / MANIFEST_FILE
    manifest = Manifest.from_json(json.loads(where.read_text()), where)
    files = {
        name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
        for name in manifest.files
    }
    _replace(where, json.dumps(replace(manifest, files=files).to_json()).encode())


KINDS = (
    Kind("safetensors headers", _prepare_headers, _try_header, 25),
    Kind("manifests", _prepare_artifacts, _try_manifest, 15),
    Kind("packed weights", _prepare_packed, _try_packed, 5),
    Kind("config.json", _prepare_models, _try_config, 10),
    Kind("quantization_config", _prepare_packed, _try_quantisation, 5),
    Kind("indices", _prepare_shards, _try_index, 5),
    Kind("recipes", _prepare_recipes, _try_recipe, 20),
    Kind("texts", _prepare_texts, _try_text, 15),
)
