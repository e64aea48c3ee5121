"""Checkpoints that other tools wrote, taken over by ``sparseserve convert``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.exporters import load_dense_state
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import save_tiny_model, tiny_model, tiny_tokenizer
from sparseserve.workflow.convert import convert
from tests.integration.command_line import Cli

FIXTURES = Path(__file__).parents[1] / "data" / "foreign"
EXPECTED: dict[str, dict[str, str]] = json.loads((FIXTURES / "expected.json").read_text())
Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tensor_is_what_was_compressed(name: str, tmp_path: Path) -> None:
    artifact = convert(str(FIXTURES / name), tmp_path / "out")
    verify(artifact.path)
    assert artifact.manifest.format == "packed24"
    assert len(artifact.manifest.pruned) == 7
    found = {key: digest(tensor) for key, tensor in load_dense_state(artifact.path).items()}
    assert found == EXPECTED[name]
    assert "quantization_config" not in json.loads(
        (
            convert(str(FIXTURES / name), tmp_path / "dense", "dense").path / "config.json"
        ).read_text()
    )
    AutoModelForCausalLM.from_pretrained(artifact.path)


def changed(source: Path, copy: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def replace_by(
    name: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("bitmask-bfloat16", drop(f"{Q}.bitmask"), f"{Q} is stored as sparse-24-bitmask, but its"),
        ("bitmask-bfloat16", drop(f"{Q}.shape"), "its shape is missing"),
        ("bitmask-bfloat16", drop("model.norm.weight"), r"model\.norm\.weight is missing"),
        ("bitmask-bfloat16", replace_by(f"{Q}.bitmask", lambda t: t ^ 1), f"{Q}: bitmask keeps"),
        ("bitmask-bfloat16", replace_by(f"{Q}.compressed", lambda t: t[:, 2:]), f"{Q}: compressed"),
        ("bitmask-int8", drop(f"{Q}.weight_scale"), f"{Q} is torch.int8, but has no weight_scale"),
        ("bitmask-int8", replace_by(f"{Q}.weight_scale", lambda t: t[1:]), f"{Q}.weight_scale"),
        ("marlin-int4", drop(f"{Q}.meta"), f"{Q} is stored as marlin-24, but its meta is missing"),
        ("marlin-int4", replace_by(f"{Q}.meta", torch.zeros_like), f"{Q}: indices at row 0"),
        ("marlin-int4", replace_by(f"{Q}.scale_packed", lambda t: t[:, :32]), f"{Q}: "),
    ],
)
def test_a_changed_copy_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, name: str, change: Callable[[Tensors], object], reason: str
) -> None:
    folder = changed(FIXTURES / name, tmp_path / "copy", change)
    with pytest.raises(ArtifactError, match=reason):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def zeros(tmp_path: Path) -> Path:
    """Return a dense GPT-2 with 2:4 zeros in all linears but one, as pruning scripts leave it."""
    folder = save_tiny_model("gpt2", tmp_path / "zeros")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".h." in name and tensor.ndim == 2 and "h.1.mlp.c_proj" not in name:
            tensors[name] = TWO_FOUR.project(tensor.T).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["sparsity_config"] = {"format": "dense", "sparsity_structure": "2:4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_dense_weights_with_zeros_in_place_are_packed_and_the_others_named(
    zeros: Path, tmp_path: Path, cli: Cli
) -> None:
    done = cli("convert", zeros, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "7 2:4 linears from dense" in done.stdout
    assert "1 linears are not 2:4 and stay dense, the first is transformer.h.1.mlp.c_proj" in (
        done.stdout
    )
    found = load_dense_state(verify(tmp_path / "out").path)
    original = load_file(zeros / "model.safetensors")
    assert found.keys() == original.keys()
    assert all(tensor.equal(original[name]) for name, tensor in found.items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "olmoe"])
def test_experts_are_packed_one_by_one_whether_or_not_they_share_a_tensor(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    with unstacked_experts(model):
        experts = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".experts." in name
        ]
        for module in experts[:-1]:
            module.weight.data.copy_(TWO_FOUR.project(module.weight.data))
    model.save_pretrained(tmp_path / "zeros")
    tiny_tokenizer().save_pretrained(tmp_path / "zeros")
    artifact = verify(convert(str(tmp_path / "zeros"), tmp_path / "out").path)
    assert len(artifact.manifest.pruned) == len(experts) - 1
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(artifact.path)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_weight_that_is_almost_two_four_is_refused_by_its_first_place(
    zeros: Path, tmp_path: Path
) -> None:
    name = "transformer.h.0.attn.c_proj"

    def fill(tensors: Tensors) -> None:
        tensors[f"{name}.weight"][8:12, 3] = 1

    folder = changed(zeros, tmp_path / "copy", fill)
    with pytest.raises(ArtifactError, match=rf"{name} is almost 2:4 .* row 3, columns from 8"):
        convert(str(folder), tmp_path / "out")


def test_a_dense_model_is_told_how_it_is_pruned(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"none of its 14 .* 2:4: sparseserve prune-and-export"):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize("leaf", ["qweight", "weight_scale_inv", "weight_shape"])
def test_a_format_that_is_not_read_is_refused_by_name(tmp_path: Path, leaf: str) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")

    def store(tensors: Tensors) -> None:
        tensors[f"{Q}.{leaf}"] = tensors.pop(f"{Q}.weight")

    with pytest.raises(ArtifactError, match=rf"{Q}\.{leaf} is of a format that is not read here"):
        convert(str(changed(folder, tmp_path / "copy", store)), tmp_path / "out")


def test_a_checkpoint_of_ours_is_exported_not_converted(tmp_path: Path) -> None:
    ours = convert(str(FIXTURES / "marlin-int8"), tmp_path / "ours")
    with pytest.raises(ArtifactError, match="sparseserve export"):
        convert(str(ours.path), tmp_path / "out")
