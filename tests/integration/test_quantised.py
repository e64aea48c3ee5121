"""Kept weights in fewer bits, from the main job to whoever opens the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.exporters import load_dense_state
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.report import OperatorReport, PruneReport
from sparseserve.testing import tiny_tokenizer
from sparseserve.workflow.run import export
from tests.integration.command_line import Cli, refusal
from tests.integration.conftest import Prune
from tests.integration.test_damage_and_resume import reseal

KINDS = ["int8", "fp8", "int4"]
# Plain, transposed, renamed, and experts with a tensor each or one for all.
CASES = [
    *(("llama", kind) for kind in KINDS),
    ("gpt2", "int4"),
    ("gemma3", "fp8"),
    ("mixtral", "int8"),
    ("gpt_oss", "int4"),
]


@pytest.fixture
def rounding(quick: PruneRecipe) -> Callable[[str], PruneRecipe]:
    return lambda kind: replace(quick, quantization=Quantization(to=kind))


def same_tensors(one: Artifact, other: Artifact) -> bool:
    left, right = dict(one.checkpoint.tensors()), dict(other.checkpoint.tensors())
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_family_is_pruned_rounded_and_opened_as_its_dense_export_is(
    prune: Prune,
    rounding: Callable[[str], PruneRecipe],
    tmp_path: Path,
    family: str,
    kind: str,
) -> None:
    recipe = replace(rounding(kind), dtype="bfloat16")
    packed = prune(family, recipe=recipe)
    assert verify(packed.path).manifest.pruned
    dense = export(packed.path, tmp_path / "dense", "dense")
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (packed.path, dense.path)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    wide = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (packed.path, dense.path)
    ]
    assert all(torch.equal(wide[0][name], wide[1][name]) for name in one)
    again = export(packed.path, tmp_path / "again", "packed24")
    assert same_tensors(packed, again)


def test_a_router_that_its_class_keeps_in_float32_stays_so_beside_codes(
    prune: Prune, rounding: Callable[[str], PruneRecipe], tmp_path: Path
) -> None:
    config = Ernie4_5_MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
    )
    torch.manual_seed(0)
    source = tmp_path / "ernie"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    packed = prune(source, recipe=replace(rounding("int8"), dtype="bfloat16"))
    dense = export(packed.path, tmp_path / "dense", "dense")
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        for folder in (packed.path, dense.path)
    )
    assert one["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_and_the_card_say_what_rounding_did(
    prune: Prune, rounding: Callable[[str], PruneRecipe], tmp_path: Path, kind: str
) -> None:
    packed = prune("llama", recipe=rounding(kind))
    found = PruneReport.from_json(packed.manifest.report).quantization
    assert found is not None
    assert found.to == kind
    assert 0 < (found.mean_relative_error or 0) < 0.15
    card = (packed.path / "README.md").read_text()
    assert f"kept weights to {kind}, one scale for each" in card
    plain = export(
        prune("llama", "float").path,
        tmp_path / "nearest",
        "packed24",
        quantization=Quantization(to=kind),
    )
    assert "each to the nearest" in (plain.path / "README.md").read_text()


def test_rounding_comes_after_training_and_keeps_the_mask(
    prune: Prune, rounding: Callable[[str], PruneRecipe]
) -> None:
    trained = replace(rounding("int4"), reconstruction=Reconstruction(epochs=1))
    exact = prune("llama", "exact", recipe=replace(trained, quantization=Quantization()))
    rounded = prune("llama", "rounded", recipe=trained)
    before, after = (load_dense_state(artifact.path) for artifact in (exact, rounded))
    for module in exact.manifest.pruned:
        one, other = before[f"{module}.weight"], after[f"{module}.weight"]
        assert not other[one == 0].any()
        assert 0 < float((one - other).norm() / one.norm()) < 0.3
    untouched = before.keys() - {f"{name}.weight" for name in exact.manifest.pruned}
    assert all(torch.equal(before[name], after[name]) for name in untouched)


class _DiesInRounding(PruneProgress):
    def __init__(self) -> None:
        self.rounding = False

    def stage(self, text: str) -> None:
        self.rounding |= text.startswith("rounding")

    def operator_pruned(self, report: OperatorReport) -> None:
        if self.rounding and "layers.1" in report.name:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_while_it_rounds_ends_with_the_same_weights(
    prune: Prune, rounding: Callable[[str], PruneRecipe], tmp_path: Path
) -> None:
    recipe = rounding("int4")
    undisturbed = prune("llama", "undisturbed", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        prune("llama", "killed", recipe=recipe, progress=_DiesInRounding())
    assert (tmp_path / "killed.partial" / "rounded" / "model.layers.0").is_dir()
    assert same_tensors(prune("llama", "killed", recipe=recipe), undisturbed)


def test_a_rounded_checkpoint_is_rounded_again_or_taken_back(
    prune: Prune, rounding: Callable[[str], PruneRecipe], tmp_path: Path
) -> None:
    packed = prune("llama", recipe=rounding("int8"))
    four = export(packed.path, tmp_path / "four", "packed24", quantization=Quantization(to="int4"))
    wide = export(packed.path, tmp_path / "wide", "packed24", quantization=Quantization())
    verify(four.path)
    verify(wide.path)
    assert "weight_scale" not in " ".join(wide.manifest.tensors)
    one, other = load_dense_state(packed.path), load_dense_state(wide.path)
    assert all(torch.equal(one[name], other[name]) for name in one)
    narrow = export(packed.path, tmp_path / "narrow", "packed24", torch.float16)
    codes = {
        name: load_file(folder.path / "model.safetensors")
        for name, folder in (("packed", packed), ("narrow", narrow))
    }
    name = f"{packed.manifest.pruned[0]}.weight"
    assert torch.equal(codes["packed"][name], codes["narrow"][name])


@pytest.mark.parametrize("form", ["semi_structured", "dense"])
def test_other_formats_hold_what_the_codes_stand_for(
    prune: Prune, rounding: Callable[[str], PruneRecipe], tmp_path: Path, form: str
) -> None:
    packed = prune("llama", recipe=rounding("fp8"))
    other = export(packed.path, tmp_path / form, form, torch.bfloat16)
    verify(other.path)
    one, found = load_dense_state(packed.path), load_dense_state(other.path)
    assert all(torch.equal(one[name].bfloat16(), found[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"type": "int", "bits": 4, "group_size": 64},
            "stored as I8 with scales, but config.json says int4",
        ),
        (
            {"type": "float", "bits": 32, "group_size": None},
            "as I8 with scales, but config.json says none",
        ),
    ],
)
def test_a_configuration_that_tells_of_other_codes_is_damage(
    prune: Prune, rounding: Callable[[str], PruneRecipe], change: object, message: str
) -> None:
    packed = prune("llama", recipe=rounding("int8")).path
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= {"weights": change, "activations": None}
    (packed / "config.json").write_text(json.dumps(config))
    reseal(packed)
    with pytest.raises(ArtifactError, match=message):
        verify(packed)


def test_scales_of_weights_that_are_no_codes_are_damage(prune: Prune) -> None:
    packed = prune("llama").path
    tensors = load_file(packed / "model.safetensors")
    module = Artifact.open(packed).manifest.pruned[0]
    tensors[f"{module}.weight_scale"] = torch.ones(len(tensors[f"{module}.weight"]), 1)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((packed / "sparseserve.json").read_text())
    manifest["tensors"] = sorted(tensors)
    (packed / "sparseserve.json").write_text(json.dumps(manifest))
    reseal(packed)
    with pytest.raises(ArtifactError, match="is stored as F32 with scales"):
        verify(packed)


def test_codes_without_their_scale_are_damage(
    prune: Prune, rounding: Callable[[str], PruneRecipe]
) -> None:
    packed = prune("llama", recipe=rounding("int8")).path
    tensors = load_file(packed / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("up_proj.weight_scale"))
    del tensors[lost]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"tensor {lost} is missing"):
        verify(packed)


def test_what_cannot_be_rounded_is_refused_before_any_work(cli: Cli, prune: Prune) -> None:
    prune("llama")
    asked = ("prune-and-export", "model-llama", "-o", "new", "--samples", "2")
    for options, message in (
        (("--quantize", "int8", "--format", "dense"), "dense holds no int8 weights"),
        (("--quantize", "int8", "--pattern", "50%"), "use --format packed24 with 2:4"),
        (("--quantize", "int9"), "unknown quantization 'int9'"),
        (("--group-size", "64"), "group_size 64 is for int4 alone"),
        (("--quantize", "int4", "--group-size", "65"), "group_size 65 must be one of 32, 64, 128"),
    ):
        assert message in refusal(cli(*asked, *options))
    again = ("export", "out", "-o", "new", "--format")
    assert "onnx holds no int8 weights" in refusal(cli(*again, "onnx", "--quantize", "int8"))
    alone = refusal(cli(*again, "packed24", "--group-size", "64"))
    assert "--group-size is for --quantize int4" in alone
