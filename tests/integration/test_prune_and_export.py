"""The main job end to end, for every family, read back by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparseserve.checkpoint.artifact import write_manifest
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError, NumericalError
from sparseserve.exporters import export_packed24, load_dense_state
from sparseserve.models.loading import load_model
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.fista import Fista
from sparseserve.pruners.refit import Refit
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.steps import Reconstruction
from sparseserve.recipe.toml import recipe_from_mapping
from sparseserve.report import PruneReport
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import TWO_FOUR, UnstructuredPattern
from sparseserve.testing import TINY_FAMILIES, save_tiny_model
from sparseserve.text.calibration import load_calibration
from sparseserve.workflow.run import export

IDS = torch.arange(20)[None]

CHECKPOINTS = [name for name, row in FORMATS.items() if row.storage]


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_pruned_packed_and_read_back(
    prune: Any, tmp_path: Path, family: str
) -> None:
    dense = prune(family, "dense", export_format="dense")
    packed = export(dense.path, tmp_path / "packed", "packed24")
    assert same_bits(load_dense_state(packed.path), dict(dense.checkpoint.tensors()))
    assert verify(dense.path).manifest.pruned == verify(packed.path).manifest.pruned

    model, loading = AutoModelForCausalLM.from_pretrained(dense.path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    state = model.state_dict()
    for name in dense.manifest.pruned:
        weight = state[f"{name}.weight"]
        weight = weight.T if name in dense.manifest.transposed else weight
        assert TWO_FOUR.first_violation(weight) is None
        assert (weight != 0).any()
    original = AutoModelForCausalLM.from_pretrained(tmp_path / f"model-{family}")
    untouched = set(state) - {f"{name}.weight" for name in dense.manifest.pruned}
    assert untouched
    assert all(torch.equal(state[name], original.state_dict()[name]) for name in untouched)
    assert not torch.equal(model(IDS).logits, original(IDS).logits)


def test_all_linears_of_the_decoder_layers_are_pruned_and_nothing_else(prune: Any) -> None:
    artifact = prune("llama", export_format="dense")
    kinds = {name.rsplit(".", 1)[1] for name in artifact.manifest.pruned}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds == projections
    assert len(artifact.manifest.pruned) == 2 * len(projections)


@pytest.mark.parametrize("export_format", CHECKPOINTS)
def test_tokenizer_and_chat_template_come_along(
    prune: Any, tmp_path: Path, export_format: Any
) -> None:
    out = prune("llama", export_format=export_format).path
    before, after = (
        AutoTokenizer.from_pretrained(path) for path in (tmp_path / "model-llama", out)
    )
    assert after("some text").input_ids == before("some text").input_ids
    assert after.chat_template == before.chat_template
    assert (out / "generation_config.json").exists()
    source = json.loads((tmp_path / "model-llama" / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    written.pop("quantization_config", None)
    if export_format == "semi_structured":
        assert written.pop("dtype") == "bfloat16"
        assert source.pop("dtype") == "float32"
    assert written == source


def test_packed_weights_take_nine_sixteenths_of_sixteen_bits(prune: Any, tmp_path: Path) -> None:
    source = save_tiny_model("llama", tmp_path / "half", dtype=torch.bfloat16)
    packed = prune(source)
    for name in packed.manifest.pruned:
        values = packed.checkpoint.tensor(f"{name}.weight")
        indices = packed.checkpoint.tensor(f"{name}.weight_indices")
        assert values.dtype == torch.bfloat16
        assert (values.nbytes + indices.nbytes) * 16 == values.numel() * 2 * 2 * 9


def test_formats_convert_into_each_other_bit_for_bit(prune: Any, tmp_path: Path) -> None:
    packed = prune("gpt2")
    dense = export(packed.path, tmp_path / "dense", "dense")
    again = export(dense.path, tmp_path / "again", "packed24")
    assert same_bits(dict(packed.checkpoint.tensors()), dict(again.checkpoint.tensors()))
    assert same_bits(load_dense_state(packed.path), dict(dense.checkpoint.tensors()))
    verify(again.path)


def test_an_export_can_round_all_weights_to_another_dtype(prune: Any, tmp_path: Path) -> None:
    packed = prune("llama")
    narrow = export(packed.path, tmp_path / "narrow", "packed24", torch.float16)
    state = {name: t.half() for name, t in load_dense_state(packed.path).items()}
    assert same_bits(load_dense_state(narrow.path), state)
    model = AutoModelForCausalLM.from_pretrained(
        export(narrow.path, tmp_path / "dense", "dense").path
    )
    assert model.dtype == torch.float16
    verify(narrow.path)


def test_a_weight_too_large_for_the_dtype_is_named_and_nothing_is_written(
    prune: Any, tmp_path: Path
) -> None:
    dense = prune("llama", "dense", export_format="dense")
    tensors = dict(dense.checkpoint.tensors())
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e5)
    save_file(tensors, dense.path / "model.safetensors", metadata={"format": "pt"})
    write_manifest(dense.path, dense.manifest)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight holds 100000, more than float16"):
        export(dense.path, tmp_path / "narrow", "packed24", torch.float16)
    assert not (tmp_path / "narrow").exists()


def test_small_shards_hold_the_same_tensors(prune: Any, tmp_path: Path) -> None:
    packed = prune("llama")
    sharded = export_packed24(packed, tmp_path / "sharded", shard_bytes=10_000)
    assert len(list(sharded.path.glob("*.safetensors"))) > 3
    assert same_bits(dict(packed.checkpoint.tensors()), dict(sharded.checkpoint.tensors()))
    verify(sharded.path)


@pytest.mark.parametrize(
    ("pruner", "converged"),
    [(Wanda(), None), (Admm(), True), (Admm(iterations=1), False), (Refit(iterations=1), False)],
)
def test_the_report_says_whether_the_solver_converged(
    prune: Any, with_pruner: Any, pruner: Any, converged: bool | None
) -> None:
    report = PruneReport.from_json(prune("llama", recipe=with_pruner(pruner)).manifest.report)
    assert {operator.converged for operator in report.operators} == {converged}
    for operator in report.operators:
        assert (operator.residual is None) == (converged is None)


def test_ignored_linears_stay_dense(prune: Any, quick: Any) -> None:
    recipe = replace(quick, ignore=("k_proj$", r"layers\.0\."))
    artifact = prune("llama", recipe=recipe)
    assert len(artifact.manifest.pruned) == 6
    assert all("layers.1." in name and "k_proj" not in name for name in artifact.manifest.pruned)
    assert "model.layers.1.self_attn.k_proj.weight" in artifact.checkpoint
    assert len(PruneReport.from_json(artifact.manifest.report).dense_modules) == 8


def test_the_report_says_what_was_done(prune: Any, with_pruner: Any) -> None:
    manifest = prune("llama", recipe=with_pruner(Fista())).manifest
    assert recipe_from_mapping(manifest.recipe) == with_pruner(Fista())
    assert manifest.calibration["tokens"] == 3 * 16
    assert len(manifest.calibration["sources"][0]["sha256"]) == 64
    report = PruneReport.from_json(manifest.report)
    assert json.loads(json.dumps(report.to_json())) == manifest.report
    assert [layer.name for layer in report.layers] == ["model.layers.0", "model.layers.1"]
    assert all(0 < operator.relative_error < 1 for operator in report.operators)
    assert all(operator.sparsity >= 0.5 for operator in report.operators)
    assert report.environment.torch == version("torch")


def test_intra_layer_correction_lowers_the_error_of_the_whole_layer(
    prune: Any, with_pruner: Any, tmp_path: Path
) -> None:
    """Judged on what leaves the first layer for the calibration tokens: what it is to repair."""
    errors = {}
    for correction in ("none", "intra"):
        recipe = with_pruner(Fista(), error_correction=correction)
        recipe = replace(recipe, calibration=replace(recipe.calibration, samples=64))
        out = prune("llama", correction, recipe=recipe, export_format="dense").path
        original, pruned = load_model(tmp_path / "model-llama"), load_model(out)
        spec = recipe.calibration
        ids = torch.stack(load_calibration(spec, original.tokenizer, None).windows)
        with torch.no_grad():
            dense_states, pruned_states = (
                loaded.model.model(ids, output_hidden_states=True).hidden_states[1]
                for loaded in (original, pruned)
            )
        errors[correction] = float((dense_states - pruned_states).norm())
    assert errors["intra"] < errors["none"]


def test_inter_layer_correction_without_weight_only_sees_the_pruned_layers_before(
    prune: Any, with_pruner: Any
) -> None:
    """Whatever the correction, the first layer's first operators see dense inputs only."""
    weights = {}
    for correction in ("none", "intra", "intra+inter", "sequential"):
        recipe = with_pruner(SparseGPT(), error_correction=correction)
        out = prune("llama", correction, recipe=recipe, export_format="dense")
        weights[correction] = dict(out.checkpoint.tensors())
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    for found in weights.values():
        assert torch.equal(found[first], weights["none"][first])
    assert torch.equal(weights["intra"][second], weights["none"][second])
    for chained in ("intra+inter", "sequential"):
        assert not torch.equal(weights[chained][second], weights["none"][second])


def test_only_the_first_layers_see_scrambled_copies(
    prune: Any, with_pruner: Any, quick: Any
) -> None:
    """Without error correction a layer depends on its own calibration windows alone."""
    plain = with_pruner(SparseGPT(), error_correction="none")
    spec = replace(quick.calibration, scrambled=2, scrambled_layers=1)
    first = prune("llama", "plain", recipe=plain, export_format="dense")
    second = prune(
        "llama", "scrambled", recipe=replace(plain, calibration=spec), export_format="dense"
    )
    assert first.manifest.calibration == second.manifest.calibration
    for name in first.manifest.pruned:
        weights = [each.checkpoint.tensor(f"{name}.weight") for each in (first, second)]
        assert torch.equal(*weights) == (".layers.1." in name)


def test_reconstruction_is_reported_and_its_norms_are_stored(
    prune: Any, with_pruner: Any, tmp_path: Path
) -> None:
    knobs = Reconstruction(epochs=3, learning_rate=0.02)
    recipe = with_pruner(Wanda(), reconstruction=knobs)
    recipe = replace(recipe, calibration=replace(recipe.calibration, samples=8))
    packed = prune("gpt2", recipe=recipe)
    report = PruneReport.from_json(packed.manifest.report)
    for layer in report.layers:
        assert layer.reconstruction is not None
        assert layer.reconstruction.error_after < layer.reconstruction.error_before
    stored = load_dense_state(verify(packed.path).path)
    original = load_model(tmp_path / "model-gpt2").model.state_dict()
    changed = {name for name, value in stored.items() if not torch.equal(value, original[name])}
    assert {"transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.bias"} < changed
    assert not any("wte" in name or "wpe" in name or "ln_f" in name for name in changed)


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_retraining_is_reported_keeps_the_zeros_and_packs(
    prune: Any, with_pruner: Any, distillation: float
) -> None:
    knobs = Retraining(epochs=2, rank=2, distillation=distillation, learning_rate=0.01)
    recipe = with_pruner(Wanda(), retraining=knobs)
    recipe = replace(recipe, calibration=replace(recipe.calibration, samples=6))
    plain = prune("llama", "plain", recipe=replace(recipe, retraining=Retraining()))
    packed = verify(prune("llama", "trained", recipe=recipe).path)
    assert recipe_from_mapping(packed.manifest.recipe) == recipe
    report = PruneReport.from_json(packed.manifest.report)
    assert json.loads(json.dumps(report.to_json())) == packed.manifest.report
    assert report.retraining is not None
    assert report.retraining.after.loss < report.retraining.before.loss
    before, after = load_dense_state(plain.path), load_dense_state(packed.path)
    for name in packed.manifest.pruned:
        weight = after[f"{name}.weight"]
        assert not weight[before[f"{name}.weight"] == 0].any()
        assert not torch.equal(weight, before[f"{name}.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("pruner", [SparseGPT(), Fista()])
def test_unstructured_and_other_patterns_are_stored_dense(
    prune: Any, with_pruner: Any, pruner: Any
) -> None:
    recipe = with_pruner(pruner, pattern=UnstructuredPattern(0.6))
    artifact = prune("opt", recipe=recipe, export_format="dense")
    assert verify(artifact.path).manifest.pattern == "60%"
    with pytest.raises(ArtifactError, match="packed24 holds only 2:4 weights, not 60%"):
        prune("opt", "packed", recipe=recipe, export_format="packed24")


def test_the_stored_dtype_can_be_chosen(prune: Any, quick: Any) -> None:
    artifact = prune("llama", recipe=replace(quick, dtype="bfloat16"), export_format="dense")
    dtypes = {tensor.dtype for _, tensor in artifact.checkpoint.tensors()}
    assert dtypes == {torch.bfloat16}
    assert json.loads((artifact.path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_weight_that_overflows_its_dtype_is_named(prune: Any, tmp_path: Path, quick: Any) -> None:
    source = save_tiny_model("llama", tmp_path / "large")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    model.save_pretrained(source)
    with pytest.raises(NumericalError, match="up_proj"):
        prune(source, recipe=replace(quick, dtype="float16"))
