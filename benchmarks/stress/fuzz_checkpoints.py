"""Damaged checkpoints: headers, manifests, packed weights, and how they are quantised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.stress.fuzz_answers import copied, put, require_same, seal_files, sealed
from benchmarks.stress.fuzz_models import try_serving
from benchmarks.stress.mutations import Chance, mutated_bytes, mutated_json, mutated_text_of_json
from benchmarks.stress.plain_readings import plain_packed_weight, plain_safetensors
from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.verification import verify
from sparseserve.huggingface.checkpoint_model import open_checkpoint
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.toml import UNTRAINED
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.inspection import inspect_checkpoint
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import export, prune_and_export

_STORED_AS = MappingProxyType({"llama": "packed24", "gpt_oss": "dense", "gpt2": "dense"})
_CODES = ("int8", "fp8", "int4")
_TEXT = "\n\n".join(f"Sentence {i} of {i * 7 % 31} words." for i in range(200))


def prepare_headers(folder: Path) -> None:
    tensors = {
        "a.weight": torch.randn(4, 8),
        "b.weight": torch.randn(3, 4).bfloat16(),
        "c": torch.arange(6, dtype=torch.int64),
        "d.mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, folder / "base.safetensors", metadata={"format": "pt"})


def try_header(folder: Path, chance: Chance) -> None:
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
    require_same(
        {name: checkpoint.tensor(name) for name in checkpoint.files}, plain_safetensors(data)
    )
    inspect_checkpoint(path)


def prepare_packed(folder: Path) -> None:
    prepare_artifacts(folder, {"llama": "packed24"})


def prepare_codes(folder: Path) -> None:
    prepare_packed(folder)
    for kind in _CODES:
        whole = folder / "corpus" / kind
        export(folder / "corpus" / "llama", whole, "packed24", quantization=Quantization(to=kind))


def prepare_artifacts(folder: Path, stored_as: Mapping[str, str] = _STORED_AS) -> None:
    (folder / "text.txt").write_text(_TEXT)
    calibration = CalibrationSpec(
        source=str(folder / "text.txt"), samples=2, sequence_length=16, scrambled=0
    )
    recipe = replace(UNTRAINED, pruner=Wanda(), calibration=calibration)
    for family, kind in stored_as.items():
        source = save_tiny_model(family, folder / f"model-{family}")
        prune_and_export(Job(str(source), recipe, kind), folder / "corpus" / family)
        export(folder / "corpus" / family, folder / "dense" / family, "dense")


def try_manifest(folder: Path, chance: Chance) -> None:
    family = chance.choice(sorted(path.name for path in (folder / "corpus").iterdir()))
    made = copied(folder / "corpus" / family, folder / "input")
    body = json.loads((made / MANIFEST_FILE).read_text())
    changed = mutated_json(body, chance)
    if isinstance(changed, dict) and chance.random() < 0.7:
        changed = sealed(changed)
    text = json.dumps(changed).encode()
    put(made / MANIFEST_FILE, mutated_bytes(text, chance) if chance.random() < 0.1 else text)
    artifact = verify(made)
    original = Artifact.open(folder / "corpus" / family)
    checkpoint, truth = artifact.checkpoint, original.checkpoint
    for module in artifact.manifest.pruned:
        found = artifact.pruned_weight(checkpoint, module)
        require_same({module: found}, {module: original.pruned_weight(truth, module)})
    if chance.random() < 0.1:
        _require_same_export(folder, family)
        inspect_checkpoint(made)


def _require_same_export(folder: Path, family: str) -> None:
    shutil.rmtree(folder / "exported", ignore_errors=True)
    export(folder / "input", folder / "exported", "dense")
    truth = load_file(folder / "dense" / family / "model.safetensors")
    require_same(load_file(folder / "exported" / "model.safetensors"), truth)


def try_codes(folder: Path, chance: Chance) -> None:
    try_packed(folder, chance, chance.choice(_CODES))


def try_packed(folder: Path, chance: Chance, name: str = "llama") -> None:
    made = copied(folder / "corpus" / name, folder / "input")
    data = bytearray((made / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.choice((1, 1, 2, 50))):
        data[chance.randrange(header, len(data))] ^= 1 << chance.randrange(8)
    put(made / "model.safetensors", bytes(data))
    seal_files(made)
    artifact = verify(made)
    _require_packed(artifact, plain_safetensors(bytes(data)))


def _require_packed(artifact: Artifact, tensors: Mapping[str, Tensor]) -> None:
    """Compare what is read of a packed checkpoint, in two ways, with a plain reading."""
    checkpoint, model = artifact.checkpoint, open_checkpoint(artifact.path)
    for module in artifact.manifest.pruned:
        truth = plain_packed_weight(tensors, module)
        require_same({module: artifact.pruned_weight(checkpoint, module)}, {module: truth})
        require_same({module: model.get_parameter(f"{module}.weight")}, {module: truth})


def try_quantisation(folder: Path, chance: Chance) -> None:
    made = copied(folder / "corpus" / "llama", folder / "input")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = mutated_json(config["quantization_config"], chance)
    if chance.random() < 0.2:
        method = chance.choice(("fp8", "mxfp4", "sparseserve", "gptq", "bitsandbytes", "", None))
        config["quantization_config"] = {"quant_method": method}
    put(made / "config.json", json.dumps(config).encode())
    seal_files(made)
    if chance.random() < 0.2:
        try_serving(made)
    _require_packed(
        Artifact.open(made), plain_safetensors((made / "model.safetensors").read_bytes())
    )
