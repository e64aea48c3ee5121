"""The experiments name recipes that exist, and results that do not overwrite each other."""

from __future__ import annotations

from dataclasses import replace

import click
import pytest

from benchmarks.harness.evaluation_texts import named_texts
from benchmarks.quality.compare import Setting, default_variant, recipe_of
from benchmarks.quality.evidence import command, experiments
from sparseserve.pruners.fista_paper import ENDING_PAPER_FISTA
from sparseserve.recipe.toml import PRESETS
from sparseserve.text.calibration import CalibrationSpec

SETTING = Setting(
    model="m",
    pattern="2:4",
    calibration=None,
    samples=4,
    sequence_length=8,
    evaluation_windows=1,
    evaluation_length=8,
    texts={},
)


@pytest.mark.parametrize("name", PRESETS)
def test_the_name_of_a_preset_is_all_of_it_but_the_windows(name: str) -> None:
    recipe, preset = recipe_of(name, SETTING, 3), PRESETS[name]
    spec = replace(SETTING.calibration_spec(3), scrambled=preset.calibration.scrambled)
    assert recipe == replace(preset, calibration=spec)


def test_every_variant_is_a_recipe_and_no_two_are_the_same() -> None:
    for experiment in experiments():
        recipes = [recipe_of(variant, SETTING, 0) for variant in experiment.variants]
        assert len({repr(recipe) for recipe in recipes}) == len(recipes)


def test_every_experiment_has_a_result_of_its_own() -> None:
    calls = [
        command(experiment, "m", "folder", ("speeches=packaged",)) for experiment in experiments()
    ]
    results = [call[call.index("--result") + 1] for call in calls]
    assert len(set(results)) == len(results)


def test_a_variant_says_correction_weight_and_steps() -> None:
    recipe = recipe_of("wanda:intra+inter@0.25,reconstruct,retrain,scramble", SETTING, 3)
    assert recipe.method == "wanda"
    assert (recipe.error_correction, recipe.inter_weight) == ("intra+inter", 0.25)
    assert recipe.reconstruction.epochs > 0
    assert recipe.retraining.epochs > 0
    assert (recipe.calibration.seed, recipe.calibration.scrambled) == (3, 1)


def test_a_variant_says_how_many_epochs() -> None:
    usual = PRESETS["default"].reconstruction
    assert recipe_of("wanda:none,reconstruct", SETTING, 0).reconstruction == usual
    other = recipe_of(f"wanda:none,reconstruct@{usual.epochs + 1}", SETTING, 0).reconstruction
    assert other == replace(usual, epochs=usual.epochs + 1)


def test_a_variant_sets_one_knob_and_leaves_the_presets_others() -> None:
    recipe = recipe_of("fista-paper[warm_start=admm]:intra", SETTING, 0)
    assert recipe.pruner == replace(ENDING_PAPER_FISTA, warm_start="admm")
    assert recipe.error_correction == "intra"


def test_the_default_variant_is_the_default_recipe() -> None:
    recipe = recipe_of(default_variant(), SETTING, 0)
    scrambled = CalibrationSpec(scrambled=recipe.calibration.scrambled)
    assert replace(recipe, calibration=scrambled) == PRESETS["default"]


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(click.UsageError, match="no such step: retrian"):
        recipe_of("wanda:none,retrian", SETTING, 0)


def test_an_evaluation_text_is_a_name_and_a_source() -> None:
    texts = named_texts(("speeches=packaged", "wiki=a=b.txt"))
    assert texts == {"speeches": None, "wiki": "a=b.txt"}
    assert named_texts(()) == {"speeches": None}


@pytest.mark.parametrize("value", ["wiki", "wiki=", "=a.txt"])
def test_half_an_evaluation_text_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{value}' is not NAME=SOURCE"):
        named_texts((value,))


def test_two_evaluation_texts_of_one_name_are_refused() -> None:
    with pytest.raises(click.BadParameter, match="'a' names two texts"):
        named_texts(("a=x", "a=y"))
