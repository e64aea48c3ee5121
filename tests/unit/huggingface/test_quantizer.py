"""Packed weights that transformers puts together from many, and the table they are found by."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto

from sparseserve.checkpoint import packed24
from sparseserve.errors import ArtifactError
from sparseserve.huggingface import autoload
from sparseserve.huggingface.quantizer import Packed24Config, Packed24Quantizer
from sparseserve.sparsity import TWO_FOUR

EXPERTS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 96,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def two_four_experts(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model with 2:4 experts, packed; return its dense tensors by transformers' names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = TWO_FOUR.project(parameter.data.flatten(0, 1)).view_as(parameter)
    model.save_pretrained(folder)
    tensors, modules = {}, []
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".experts." in name:
            modules.append(module)
            packed = packed24.pack24(tensor)
            tensors[name], tensors[f"{module}.weight_indices"] = packed.values, packed.indices
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = packed24.quantization_config(modules, torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    return dict(model.state_dict())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_packed_one_by_one_arrive_in_the_tensor_that_holds_all_and_are_saved_dense(
    tmp_path: Path, family: str
) -> None:
    dense = two_four_experts(family, tmp_path / "packed")
    opened, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert all(torch.equal(tensor, dense[name]) for name, tensor in opened.state_dict().items())
    opened.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in again.items())
    assert not any("weight_" in name for name in load_file(tmp_path / "saved/model.safetensors"))


def test_an_expert_without_its_indices_is_not_opened(tmp_path: Path) -> None:
    two_four_experts("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight_indices"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ArtifactError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_registering_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    autoload.register()
    autoload.register()
    assert sys.meta_path == finders
    assert auto.AUTO_QUANTIZER_MAPPING["sparseserve"] is Packed24Quantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["sparseserve"] is Packed24Config


def test_where_ours_cannot_be_added_transformers_goes_on_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sparseserve.huggingface.quantizer", None)
    with pytest.warns(UserWarning, match=r"cannot teach this release .* --format dense"):
        autoload._add_to(ModuleType("transformers.quantizers.auto"))
