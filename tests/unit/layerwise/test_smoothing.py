"""A layer with smoothed channels computes the same, and int8 inputs lose less in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseserve.checkpoint.quantization import Quantization, rounded, scales_of
from sparseserve.layerwise.layer import prune_layer
from sparseserve.layerwise.preparation import Preparation
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.smoothing import smoothed, smoothing_factors
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.channel_sources import ChannelSource, find_channel_sources
from sparseserve.models.layers import (
    capture_layer_calls,
    entering_states,
    group_input,
    run_layer,
)
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model
from sparseserve.workflow.quantizing import rounding_recipe

CPU = torch.device("cpu")
INT8 = Quantization(to="int8")


def first_layer(
    folder: Path, *, dense: bool = False
) -> tuple[LayerContext, tuple[ChannelSource, ...]]:
    """Return a layer whose norm makes one channel far larger than the others."""
    model = tiny_model("llama")
    model.get_parameter("model.layers.0.input_layernorm.weight").data[5] = 60.0
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (24,), generator=generator) for _ in range(3)]
    structure = trace_structure(model, texts[0])
    calls = capture_layer_calls(model, structure, texts)
    streams = HiddenStreams.start(
        folder / "streams",
        entering_states(model, structure, texts),
        dense=dense,
        chained=not dense,
        keep_inputs=dense,
    )
    layer = structure.layers[0]
    for operator in layer.operators:
        weight = model.get_parameter(f"{layer.name}.{operator.name}.weight")
        weight.data = TWO_FOUR.project(weight.data)
    context = streams.enter(model.get_submodule(layer.name), layer, calls[0], CPU)
    return context, find_channel_sources(model, structure, texts[0][:8])[0]


@pytest.mark.parametrize("dense", [False, True], ids=["chained", "independent"])
def test_the_layer_computes_the_same_and_its_operators_see_other_channels(
    tmp_path: Path, dense: bool
) -> None:
    context, sources = first_layer(tmp_path, dense=dense)
    prepared, names = smoothed(context, sources, context.layer.operators)
    assert names == tuple(
        f"model.layers.0.{name}"
        for name in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")
    )
    group = context.layer.groups[0]
    for window, call in context.windows(context.entering):
        torch.testing.assert_close(
            run_layer(prepared.module, window, call),
            run_layer(context.module, window, call),
            rtol=1e-5,
            atol=1e-4,
        )
        inputs, before = (
            group_input(each.module, window, call, group) for each in (prepared, context)
        )
        factors = before[0] / inputs[0]
        torch.testing.assert_close(inputs * factors, before)
        assert factors[5] == factors.max() >= 2
    if dense:
        *_, last = prepared.dense_group_inputs(group)
        torch.testing.assert_close(last, inputs)


def test_rounding_the_inputs_of_a_large_channel_loses_less(tmp_path: Path) -> None:
    context, sources = first_layer(tmp_path)
    prepared, _ = smoothed(context, sources, context.layer.operators)
    group = context.layer.groups[0]
    window, call = next(context.windows(context.entering))

    def loss(module: nn.Module) -> float:
        inputs = group_input(module, window, call, group)
        weight = module.get_parameter(f"{group.operators[0].name}.weight")
        return float((inputs @ weight.T - nearest(inputs) @ nearest(weight).T).norm())

    assert loss(prepared.module) < 0.7 * loss(context.module)


def nearest(matrix: Tensor) -> Tensor:
    return rounded(matrix, scales_of(matrix, INT8), INT8)


@pytest.mark.parametrize(
    ("left", "scaled"),
    [
        ("q_proj", ["post_attention_layernorm", "mlp.up_proj"]),
        ("up_proj", ["input_layernorm"]),
        ("down_proj", ["input_layernorm", "post_attention_layernorm"]),
    ],
)
def test_an_operator_that_stays_dense_is_not_scaled(
    tmp_path: Path, left: str, scaled: list[str]
) -> None:
    context, sources = first_layer(tmp_path)
    planned = [operator for operator in context.layer.operators if left not in operator.name]
    prepared, names = smoothed(context, sources, planned)
    assert names == tuple(f"model.layers.0.{name}" for name in scaled)
    (dense,) = (operator.name for operator in context.layer.operators if left in operator.name)
    one, other = (each.module.get_parameter(f"{dense}.weight") for each in (prepared, context))
    assert torch.equal(one, other)


def test_where_nothing_can_be_scaled_the_layer_stays(tmp_path: Path) -> None:
    context, sources = first_layer(tmp_path)
    assert smoothed(context, sources, ()) == (context, ())
    assert smoothed(context, (), context.layer.operators) == (context, ())


@pytest.mark.parametrize(("kind", "scaled"), [("int8", 3), ("fp8", 0), ("int4", 0)])
def test_only_int8_whose_inputs_a_server_rounds_is_smoothed(
    tmp_path: Path, kind: str, scaled: int
) -> None:
    recipe = PruneRecipe(
        quantization=Quantization(to=kind, group_size=32 if kind == "int4" else None),
        reconstruction=Reconstruction(epochs=0),
    )
    recipe = rounding_recipe(replace(recipe, error_correction="intra+inter"))
    context, sources = first_layer(tmp_path)
    found = Preparation(channels=sources if recipe.smooths_inputs else ())
    pruned = prune_layer(context, recipe, PruneProgress(), None, found)
    assert len(pruned.report.scaled) == scaled
    norms = {name for name in pruned.parameters if "norm" in name}
    assert len(norms) == min(scaled, 2)


sizes = st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=40)


@given(inputs=sizes, unit=st.floats(1e-3, 1e3))
def test_factors_grow_with_their_channel_and_stay_within_bounds(
    inputs: list[float], unit: float
) -> None:
    channels = torch.tensor(inputs)
    factors = smoothing_factors(channels, torch.ones_like(channels))
    assert float(factors.min()) >= 2**-6
    assert float(factors.max()) <= 2**6
    known = channels > 0
    assert bool((factors[~known] == 1).all())
    order = channels[known].argsort()
    assert bool((factors[known][order].diff() >= 0).all())
    again = smoothing_factors(channels * unit, torch.ones_like(channels))
    torch.testing.assert_close(again, factors, rtol=1e-3, atol=0)
