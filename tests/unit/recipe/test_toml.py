"""Recipes by name: presets, TOML files, published methods, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparseserve.errors import RecipeError
from sparseserve.pruners import PRUNERS
from sparseserve.pruners.fista import Fista
from sparseserve.pruners.fista_paper import PaperFista
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import (
    PRESETS,
    PUBLISHED_CORRECTIONS,
    UNTRAINED,
    load_recipe,
    named_recipe,
    recipe_from_mapping,
)
from sparseserve.sparsity import NMPattern


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_back_from_its_json(name: str) -> None:
    assert recipe_from_mapping(PRESETS[name].to_json()) == PRESETS[name]


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_reads_back_by_name(name: str) -> None:
    recipe = PruneRecipe(pruner=PRUNERS[name]())
    assert recipe.method == name
    assert recipe_from_mapping(recipe.to_json()) == recipe


def test_the_paper_recipe_has_the_published_constants() -> None:
    pruner = load_recipe("paper").pruner
    assert isinstance(pruner, PaperFista)
    constants = (pruner.rounding_ratio, pruner.iterations, pruner.patience, pruner.first_lambda)
    assert constants == (0.3, 20, 3, 1e-5)


def test_a_toml_file_says_everything(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'version = 1\npattern = "4:8"\nerror_correction = "none"\nignore = ["k_proj$"]\n'
        'dtype = "bfloat16"\n[method]\nname = "fista"\npenalties = [0.5]\niterations = 3\n'
        '[calibration]\nsource = "a.txt"\nsamples = 7\nsequence_length = 64\nseed = 3\n'
    )
    recipe = load_recipe(str(file))
    assert recipe.pattern == NMPattern(4, 8)
    assert recipe.pruner == Fista(penalties=(0.5,), iterations=3)
    assert recipe.error_correction == "none"
    assert (recipe.calibration.samples, recipe.calibration.seed) == (7, 3)
    assert recipe.ignores("model.layers.0.self_attn.k_proj")
    assert not recipe.ignores("model.layers.0.self_attn.q_proj")


def test_keys_left_out_are_those_of_the_default_recipe() -> None:
    default = load_recipe("default")
    assert recipe_from_mapping({}) == default
    assert recipe_from_mapping({"method": {"name": "wanda"}}) == replace(default, pruner=Wanda())
    table = recipe_from_mapping({"reconstruction": {"learning_rate": 0.02}}).reconstruction
    assert table == replace(default.reconstruction, learning_rate=0.02)


def test_a_recipe_without_arguments_is_the_default_one() -> None:
    assert PruneRecipe() == load_recipe("default") == named_recipe(None, None)


def test_only_the_presets_default_best_and_parallel_train_and_scramble() -> None:
    trains = {
        name
        for name, recipe in PRESETS.items()
        if recipe.reconstruction.epochs or recipe.retraining.epochs or recipe.calibration.scrambled
    }
    assert trains == {"default", "best", "parallel"}


def test_parallel_is_the_default_recipe_whose_layers_do_not_depend_on_one_another() -> None:
    parallel = load_recipe("parallel")
    assert replace(parallel, error_correction="intra+inter") == load_recipe("default")
    assert not parallel.correction.chained


def test_untrained_is_the_default_recipe_without_training() -> None:
    default, untrained = load_recipe("default"), load_recipe("untrained")
    assert default == replace(
        untrained,
        reconstruction=default.reconstruction,
        calibration=replace(untrained.calibration, scrambled=default.calibration.scrambled),
    )


@pytest.mark.parametrize("method", PRUNERS)
def test_a_method_alone_is_untrained_with_its_own_correction_and_settings(method: str) -> None:
    recipe = named_recipe(None, method)
    assert recipe.pruner == PRUNERS[method]()
    assert recipe.error_correction == PUBLISHED_CORRECTIONS[method]
    assert replace(
        recipe, pruner=UNTRAINED.pruner, error_correction=UNTRAINED.error_correction
    ) == (UNTRAINED)


def test_every_method_has_a_published_correction() -> None:
    assert PUBLISHED_CORRECTIONS.keys() == PRUNERS.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", PRUNERS)
def test_a_recipe_with_a_method_differs_in_the_solver_alone(name: str, method: str) -> None:
    recipe = named_recipe(name, method)
    assert recipe.method == method
    assert replace(recipe, pruner=PRESETS[name].pruner) == PRESETS[name]
    if PRESETS[name].method == method:
        assert recipe == PRESETS[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('patern = "2:4"', "unknown key 'patern': did you mean 'pattern'"),
        ('pattern = "2-4"', "pattern '2-4' is not N:M"),
        ('[method]\nname = "fsta"', "unknown method 'fsta': did you mean 'fista'"),
        ('[method]\nname = "fista"\niteration = 3', "did you mean 'iterations'"),
        ('[method]\nname = "fista"\niterations = "3"', "'iterations' is '3', but must be"),
        (
            '[method]\nname = "fista"\npenalties = ["a"]',
            "'penalties' is ['a'], but must be a list, each item a number",
        ),
        ("[calibration]\nsamples = 0", "samples 0 must be at least 1"),
        ('error_correction = "inter"', "unknown error_correction 'inter'"),
        ('ignore = ["("]', "not a regular expression"),
        ('dtype = "int8"', "unknown dtype 'int8'"),
        ('rotate = "head"', "unknown rotate 'head': did you mean 'heads'"),
        ("version = 2", "version 2 is not 1"),
        ("method = 3", "'method' must be a table"),
        ("= broken", "cannot be read as TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_recipe_that_is_neither_preset_nor_file_is_named() -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'papr': did you mean 'paper'"):
        load_recipe("papr")


def test_an_expression_that_would_be_searched_for_ever_is_refused() -> None:
    recipe = PruneRecipe(ignore=("(a|aa)+$",))
    with pytest.raises(RecipeError, match=r"\(a\|aa\)\+\$.* more than 1 s: .*repeats"):
        recipe.ignores(f"model.layers.0.{'a' * 60}b")
