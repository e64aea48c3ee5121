"""Error corrections: what each needs, and which are refused."""

from __future__ import annotations

import pytest

from sparseserve.errors import RecipeError
from sparseserve.recipe.correction import CORRECTIONS, ErrorCorrection
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_weight_plays_a_part_only_where_layers_and_the_dense_model_meet(name: str) -> None:
    correction = ErrorCorrection.named(name, 0.3)
    mixes = correction.chained and correction.paired
    assert correction.inter_weight == (0.3 if mixes else 1.0)
    assert mixes == (name == "intra+inter")


def test_a_correction_of_no_name_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown error_correction 'inter': did you mean 'intra'"):
        ErrorCorrection.named("inter", 0.5)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(RecipeError, match="must be between 0 and 1"):
        ErrorCorrection.named("intra+inter", weight)


def test_only_an_untrained_sequential_run_needs_nothing_of_the_dense_model() -> None:
    untrained = Reconstruction(epochs=0)
    for name in CORRECTIONS:
        recipe = PruneRecipe(error_correction=name, reconstruction=untrained)
        assert recipe.compares_with_dense == (name != "sequential")
        assert PruneRecipe(error_correction=name).compares_with_dense
