"""An expression of ``ignore`` leaves something dense, or the run is refused before it begins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import RecipeError
from sparseserve.layerwise.plan import check_plan, ignored_modules
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.toml import PRESETS
from sparseserve.testing import TINY_FAMILIES, save_tiny_model, tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan, prune_and_export

QUICK = replace(PRESETS["fast"], calibration=CalibrationSpec(samples=2, sequence_length=16))
STRUCTURES = {
    family: trace_structure(tiny_model(family), torch.arange(8)) for family in TINY_FAMILIES
}
NAMES = {
    family: [layer.full_name(item) for layer in found.layers for item in layer.operators]
    for family, found in STRUCTURES.items()
}


def refusal(family: str, *ignore: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_plan(STRUCTURES[family], replace(QUICK, ignore=ignore))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_name_of_every_operator_is_accepted(family: str) -> None:
    for name in NAMES[family]:
        recipe = replace(QUICK, ignore=(f"^{re.escape(name)}$",))
        check_plan(STRUCTURES[family], recipe)
        assert ignored_modules(STRUCTURES[family], recipe) == (name,)


@given(st.sampled_from(sorted(NAMES)), st.text("abdgkmoprw._0", min_size=1, max_size=9))
def test_an_expression_is_refused_exactly_where_it_leaves_nothing_dense(
    family: str, typed: str
) -> None:
    expression = re.escape(typed)
    recipe = replace(QUICK, ignore=(expression,))
    dense = ignored_modules(STRUCTURES[family], recipe)
    if not dense:
        assert f"'{expression}' matches no operator" in refusal(family, expression)
    elif len(dense) < len(NAMES[family]):
        check_plan(STRUCTURES[family], recipe)


def test_one_that_matches_does_not_excuse_one_that_does_not() -> None:
    assert "'mlp.dwon_proj'" in refusal("llama", "k_proj", "mlp.dwon_proj")
    assert "'mlp.dwon_proj'" in refusal("llama", "mlp.dwon_proj", "k_proj")


@pytest.mark.parametrize(
    ("expression", "remedy"),
    [
        ("mlp.dwon_proj", "did you mean 'mlp.down_proj'?"),
        ("dwon_proj$", "did you mean 'down_proj'?"),
        ("re:.*down_proj", "leave 're:' out"),
        ("lm_head", "only linears in decoder layers are pruned, such as model.layers.0."),
        ("*", "not a regular expression"),
    ],
)
def test_the_remedy_is_named(expression: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(remedy)):
        check_plan(STRUCTURES["llama"], replace(QUICK, ignore=(expression,)))


def test_it_is_searched_by_the_engine_that_has_accepted_it() -> None:
    recipe = replace(QUICK, ignore=(r"\.\p{L}_proj$",))
    check_plan(STRUCTURES["llama"], recipe)
    assert "model.layers.0.self_attn.q_proj" in ignored_modules(STRUCTURES["llama"], recipe)


def test_one_that_would_be_searched_for_ever_is_refused_and_not_searched() -> None:
    # An engine without a limit of time needs more than an hour for it.
    assert "more than 1 s" in refusal("llama", r"^(a|.|..)+\d$")


def test_a_run_and_its_rehearsal_refuse_it_alike(tmp_path: Path) -> None:
    source = str(save_tiny_model("llama", tmp_path / "model"))
    job = Job(source, replace(QUICK, ignore=("dwon_proj",)))
    with pytest.raises(RecipeError, match="matches no operator"):
        plan(job)
    with pytest.raises(RecipeError, match="matches no operator"):
        prune_and_export(job, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
