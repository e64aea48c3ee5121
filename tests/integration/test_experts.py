"""The main job on mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.verification import verify
from sparseserve.exporters import load_dense_state
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.layer_list import linear_modules
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.report import PruneReport
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import EXPERT_TINY_FAMILIES, save_tiny_model
from sparseserve.workflow.inspection import inspect_checkpoint
from sparseserve.workflow.run import export
from tests.selection import representatives

Prune = Callable[..., Artifact]
FAMILIES = representatives(EXPERT_TINY_FAMILIES, ("mixtral", "gpt_oss"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_two_four_in_every_form_and_names_and_shapes_stay(
    prune: Prune, tmp_path: Path, family: str
) -> None:
    dense = prune(family, "dense", export_format="dense")
    packed = export(dense.path, tmp_path / "packed", "packed24")
    again = export(packed.path, tmp_path / "again", "dense")
    for artifact in (dense, packed, again):
        verify(artifact.path)
    source = Checkpoint.open(tmp_path / f"model-{family}")
    assert dense.checkpoint.files.keys() == source.files.keys()
    for name in source.files:
        assert dense.checkpoint.shape(name) == source.shape(name)
        assert again.checkpoint.tensor(name).equal(dense.checkpoint.tensor(name))
    model = AutoModelForCausalLM.from_pretrained(dense.path)
    with unstacked_experts(model):
        experts = {
            name: module.get_parameter("weight")
            for name, module in linear_modules(model)
            if ".experts." in name and "shared" not in name
        }
    pruned = {operator.name for operator in PruneReport.from_json(dense.manifest.report).operators}
    assert len(experts) >= 12
    assert experts.keys() <= pruned | set(dense.manifest.report["dense_modules"])
    for name in experts.keys() & pruned:
        assert TWO_FOUR.first_violation(experts[name]) is None
        assert (experts[name] != 0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_have_two_matrices_each_and_are_two_four_when_inspected(
    prune: Prune, family: str
) -> None:
    packed = prune(family)
    for module in packed.manifest.pruned:
        assert len(packed.checkpoint.shape(f"{module}.weight")) == 2
        assert f"{module}.weight_indices" in packed.checkpoint
    found = {item.name: item for item in inspect_checkpoint(packed.path).matrices}
    assert all(found[module].two_four for module in packed.manifest.pruned)
    dense = prune(family, "dense", export_format="dense")
    found = {item.name: item for item in inspect_checkpoint(dense.path).matrices}
    assert all(found[module].two_four for module in dense.manifest.pruned)


def test_experts_stay_dense_on_request(prune: Prune, quick: PruneRecipe) -> None:
    dense = prune("mixtral", recipe=replace(quick, experts="dense"), export_format="dense")
    assert {name.rsplit(".", 1)[1] for name in dense.manifest.pruned} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    left = dense.manifest.report["dense_modules"]
    assert len(left) == 2 * 4 * 3 + 2
    routers = {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert dense.manifest.report["dense_reasons"] == dict.fromkeys(
        routers, "sends tokens to experts"
    )
    assert "model.layers.1.mlp.experts.3.down_proj" in left


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_no_token_reaches_stays_dense_and_is_named(
    prune: Prune, quick: PruneRecipe, tmp_path: Path, family: str
) -> None:
    few = replace(quick, calibration=replace(quick.calibration, samples=1, sequence_length=2))
    source = save_tiny_model(family, tmp_path / "source")
    packed = prune(source, recipe=few)
    verify(packed.path)
    report = PruneReport.from_json(packed.manifest.report)
    unseen = [name for layer in report.layers for name in layer.unseen]
    assert unseen
    assert set(unseen) <= set(report.dense_modules)
    assert not {operator.name for operator in report.operators} & set(unseen)
    assert all(0 < (item.tokens or 2) <= 2 for item in report.operators)
    # Plain transformers puts packed and dense experts together.
    opened = AutoModelForCausalLM.from_pretrained(packed.path)
    original = AutoModelForCausalLM.from_pretrained(source)
    with unstacked_experts(opened), unstacked_experts(original):
        for name in unseen:
            weights = [model.get_submodule(name).weight for model in (opened, original)]
            assert torch.equal(*weights)
    assert load_dense_state(packed.path).keys() == Checkpoint.open(source).files.keys()


def test_training_a_layer_leaves_its_router_alone(prune: Prune, quick: PruneRecipe) -> None:
    trained = replace(
        quick,
        reconstruction=Reconstruction(epochs=2),
        calibration=replace(quick.calibration, samples=8, sequence_length=64),
    )
    dense = prune("mixtral", recipe=trained, export_format="dense")
    source = Checkpoint.open(dense.path.parent / "model-mixtral")
    changed = {
        name
        for name in source.files
        if not source.tensor(name).equal(dense.checkpoint.tensor(name))
    }
    assert any("norm" in name for name in changed)
    routers = {name for name in source.files if name.endswith(".gate.weight")}
    assert len(routers) == 2
    assert not routers & changed
