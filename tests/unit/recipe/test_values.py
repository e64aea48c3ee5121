"""Whatever a recipe's file holds, it is a recipe or it is refused in one line."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import RecipeError
from sparseserve.pruners import PRUNERS
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS, load_recipe, recipe_from_mapping
from sparseserve.sparsity import SparsityPattern

TABLES = ("reconstruction", "retraining", "calibration")
SINGLE = ("pattern", "error_correction", "inter_weight", "ignore", "dtype", "version")
KEYS = [
    *(("", key) for key in SINGLE),
    *((table, item.name) for table in TABLES for item in fields(getattr(PruneRecipe(), table))),
]
# All that TOML has, but dates.
scalars = (
    st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**4000)
    | st.floats()
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


def built_or_refused(data: dict[str, object]) -> None:
    try:
        recipe = recipe_from_mapping(data)
    except RecipeError:
        return
    assert recipe_from_mapping(recipe.to_json()) == recipe


@given(st.sampled_from(KEYS), values)
def test_any_value_of_any_key_is_a_recipe_or_refused(key: tuple[str, str], value: object) -> None:
    table, name = key
    built_or_refused({table: {name: value}} if table else {name: value})


@given(st.data())
def test_any_value_of_any_knob_is_a_recipe_or_refused(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(sorted(PRUNERS)))
    knobs = [item.name for item in fields(PRUNERS[method])]
    if knobs:
        knob = data.draw(st.sampled_from(knobs))
        built_or_refused({"method": {"name": method, knob: data.draw(values)}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[calibration]\nsource = 5", "'source' is 5, but must be a text"),
        ("[calibration]\ntext_column = true", "'text_column' is True, but must be a text"),
        ("[calibration]\nsequence_length = 1.5", "'sequence_length' is 1.5, but must be a whole"),
        ("[calibration]\nseed = 18446744073709551616", "--seed 18446744073709551616 must be"),
        ("[reconstruction]\nepochs = true", "'epochs' is True, but must be a whole number"),
        ("[reconstruction]\nlearning_rate = inf", "learning_rate is inf, but must be finite"),
        ("inter_weight = nan", "inter_weight"),
        ("ignore = [1]", "'ignore' is [1], but must be a list, each item a text"),
        ("ignore = ['a{99999999999999999999}']", "not a regular expression"),
        (f"ignore = ['{'(' * 2000}']", "(2000 characters) is not a regular expression"),
        (f"[method]\nname = 'admm'\ndamping = 1{'0' * 400}", "damping has 1329 bits"),
        (f"[retraining]\nepochs = 1{'0' * 30}", "epochs has 100 bits: it must be at most"),
        (f"pattern = '{'1' * 5000}:4'", "is not N:M"),
        (f"pattern = '{'9' * 5000}%'", "is not N:M"),
        (f"x = {'[' * 5000}", "cannot be read as TOML"),
        ("version = true", "version True is not 1"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r" * 300, "~nosuchuser/r.toml", "."])
def test_a_name_that_can_be_no_recipe_is_refused(name: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(name)


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.toml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RecipeError, match="1,099,511,627,776 bytes"):
        load_recipe(str(tmp_path / "r.toml"))


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400])
def test_numbers_of_a_calling_program_are_checked_alike(value: float) -> None:
    recipe = PRESETS["default"]
    with pytest.raises(RecipeError, match="learning_rate"):
        replace(recipe, reconstruction=replace(recipe.reconstruction, learning_rate=value))


@given(st.text(max_size=30))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        pattern = SparsityPattern.parse(text)
    except RecipeError:
        return
    assert 0 < pattern.density < 1
