"""Products inside layers may be computed in bfloat16; all that is kept stays float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparseserve import devices
from sparseserve.devices import arithmetic_of, autocast_dtype
from sparseserve.errors import RecipeError
from sparseserve.layerwise.reconstruction import RelativeError, reconstruct
from sparseserve.models.layer_call import LayerCall
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.recipe.toml import recipe_from_mapping
from tests.unit.layerwise.test_reconstruction import pruned_layer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("natively", [True, False])
def test_auto_is_bfloat16_on_processors_made_for_it(
    monkeypatch: pytest.MonkeyPatch, natively: bool
) -> None:
    monkeypatch.setattr(devices, "processor_has_bfloat16", lambda: natively)
    assert autocast_dtype("auto", CPU) == (torch.bfloat16 if natively else None)
    assert autocast_dtype("auto", GPU) is None
    assert autocast_dtype("float32", CPU) is None
    assert autocast_dtype("bfloat16", CPU) == autocast_dtype("bfloat16", GPU) == torch.bfloat16


def test_machines_that_round_products_differently_do_not_share_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = set()
    for natively in (True, False):
        monkeypatch.setattr(devices, "processor_has_bfloat16", lambda natively=natively: natively)
        kinds |= {arithmetic_of(CPU, rounded) for rounded in (None, torch.bfloat16)}
    assert len(kinds) == 3  # without rounding, the instructions play no part


def test_a_recipe_keeps_its_choice_and_refuses_others() -> None:
    recipe = PruneRecipe(compute_dtype="bfloat16")
    assert recipe_from_mapping(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match="unknown compute_dtype 'bfloat': did you mean"):
        replace(recipe, compute_dtype="bfloat")


class Residual(nn.Module):
    """A layer that adds a product to what enters it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        product: torch.Tensor = self.inner(hidden)
        return hidden + product


def test_a_call_rounds_the_factors_of_products_and_nothing_else() -> None:
    layer = Residual()
    hidden = torch.randn(1, 48, 64)
    call = LayerCall("layers.0", (), {}, autocast_to=torch.bfloat16)
    output = call.apply(layer, hidden)
    product = functional.linear(hidden.bfloat16(), layer.inner.weight.bfloat16())
    assert isinstance(output, torch.Tensor)
    assert output.dtype == torch.float32
    assert torch.equal(output, hidden + product)
    assert layer.inner.weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_training_in_bfloat16_ends_where_training_in_float32_does(
    tmp_path: Path, family: str
) -> None:
    pruned = pruned_layer(tmp_path, family)
    knobs = Reconstruction(epochs=6, learning_rate=0.02)
    gains = []
    for rounded in (None, torch.bfloat16):
        calls = replace(
            pruned.context.calls, first=replace(pruned.context.call, autocast_to=rounded)
        )
        result, report = reconstruct(
            replace(pruned.context, calls=calls),
            pruned.module,
            pruned.masked,
            knobs,
            RelativeError(None),
        )
        assert {value.dtype for value in result.parameters()} == {torch.float32}
        gains.append(report.error_before - report.error_after)
    assert gains[0] > 0
    assert gains[1] == pytest.approx(gains[0], rel=0.1)
