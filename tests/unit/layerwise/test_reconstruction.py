"""Reconstruction lowers a layer's output error on windows it has not seen, or changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseserve.errors import RecipeError
from sparseserve.layerwise.reconstruction import (
    OutputError,
    PredictionError,
    RelativeError,
    reconstruct,
)
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.layers import (
    capture_layer_calls,
    copy_layer,
    entering_states,
    layer_weight,
    set_layer_weight,
)
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.steps import Reconstruction
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import TINY_FAMILIES, tiny_model


@dataclass(frozen=True)
class Pruned:
    """A layer, its copy with every operator projected, and the names of the projected weights."""

    context: LayerContext
    module: nn.Module
    masked: list[str]


def pruned_layer(folder: Path, family: str = "llama", windows: int = 8, length: int = 24) -> Pruned:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (length,), generator=generator) for _ in range(windows)]
    structure = trace_structure(model, texts[0])
    calls = capture_layer_calls(model, structure, texts)
    entering = entering_states(model, structure, texts)
    streams = HiddenStreams.start(
        folder / "streams", entering, dense=True, chained=False, keep_inputs=False
    )
    layer = structure.layers[0]
    cpu = torch.device("cpu")
    run = streams.enter(model.get_submodule(layer.name), layer, calls[0], cpu)
    module = copy_layer(run.module)
    for operator in layer.operators:
        set_layer_weight(module, operator, TWO_FOUR.project(layer_weight(module, operator)))
    return Pruned(run, module, [f"{operator.name}.weight" for operator in layer.operators])


KNOBS = Reconstruction(epochs=6, learning_rate=0.02)
ALIKE: OutputError = RelativeError(None)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_error_on_held_out_windows_falls_and_zeros_stay(tmp_path: Path, family: str) -> None:
    pruned = pruned_layer(tmp_path, family)
    before = {name: value.clone() for name, value in pruned.module.named_parameters()}
    result, report = reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)
    assert report.epochs > 0
    assert report.error_after < report.error_before
    for name in pruned.masked:
        weight = result.get_parameter(name)
        assert not weight[before[name] == 0].any()
        assert not torch.equal(weight, before[name])
    for name, value in pruned.module.named_parameters():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("weights", [None, torch.linspace(0, 2, 64)])
def test_the_reported_error_is_relative_to_each_tokens_own_hidden_state(
    tmp_path: Path, weights: torch.Tensor | None
) -> None:
    pruned = pruned_layer(tmp_path)
    result, report = reconstruct(
        pruned.context, pruned.module, pruned.masked, KNOBS, RelativeError(weights)
    )

    def error(module: nn.Module) -> float:
        entering, leaving = pruned.context.entering[7], pruned.context.required_dense.leaving[7]
        output = pruned.context.call.apply(module, entering)
        assert isinstance(output, torch.Tensor)
        error = (output - leaving) * (1 if weights is None else weights.sqrt())
        relative = error.norm(dim=-1) / leaving.norm(dim=-1)
        return float(relative.square().mean().sqrt())

    assert report.error_before == pytest.approx(error(pruned.module), rel=1e-4)
    assert report.error_after == pytest.approx(error(result), rel=1e-4)


def test_where_the_output_is_predicted_from_the_divergence_of_predictions_falls(
    tmp_path: Path,
) -> None:
    pruned = pruned_layer(tmp_path)
    head = torch.randn(64, 40, generator=torch.Generator().manual_seed(2)) / 8
    run = pruned.context
    predicted = PredictionError(lambda hidden: hidden @ head)
    result, report = reconstruct(run, pruned.module, pruned.masked, KNOBS, predicted)

    def divergence(module: nn.Module) -> float:
        output = run.call.apply(module, run.entering[7])
        assert isinstance(output, torch.Tensor)
        dense, found = (
            torch.distributions.Categorical(logits=hidden @ head)
            for hidden in (run.required_dense.leaving[7], output)
        )
        return float(torch.distributions.kl_divergence(dense, found).mean())

    assert report.error_before**2 == pytest.approx(divergence(pruned.module), rel=1e-4)
    assert report.error_after**2 == pytest.approx(divergence(result), rel=1e-4)
    assert report.error_after < report.error_before


def test_long_windows_are_predicted_at_other_tokens_in_each_epoch(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path, length=250)
    seen: list[torch.Tensor] = []

    def predict(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.detach().clone())
        return hidden

    reconstruct(
        pruned.context,
        pruned.module,
        pruned.masked,
        replace(KNOBS, epochs=2),
        PredictionError(predict),
    )
    assert {hidden.shape[1] for hidden in seen} == {125}
    dense = pruned.context.required_dense.leaving
    for start in (0, 1):
        assert any(torch.equal(hidden, dense[0][:, start::2]) for hidden in seen)


def test_errors_that_nothing_reads_are_let_be(tmp_path: Path) -> None:
    """Where most features weigh nothing, the others come closer than they do otherwise."""
    pruned = pruned_layer(tmp_path)
    weights = torch.cat([torch.zeros(60), torch.full((4,), 16.0)])
    weighted = RelativeError(weights)
    alike, _ = reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)
    _, report = reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, weighted)
    _, judged = reconstruct(
        pruned.context, alike, pruned.masked, replace(KNOBS, learning_rate=1e-12), weighted
    )
    assert report.error_after < judged.error_before


def test_only_training_may_use_tensor_cores_that_round_their_inputs(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    seen = set()

    def watch(*_: object) -> None:
        seen.add((torch.is_grad_enabled(), torch.get_float32_matmul_precision()))

    pruned.module.register_forward_pre_hook(watch)
    reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)
    assert seen == {(True, "high"), (False, "highest")}
    assert torch.get_float32_matmul_precision() == "highest"


def test_matrices_that_were_not_pruned_stay_as_they_are(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    kept = "mlp.down_proj.weight"
    result, _ = reconstruct(
        pruned.context,
        pruned.module,
        [name for name in pruned.masked if name != kept],
        KNOBS,
        ALIKE,
    )
    assert torch.equal(result.get_parameter(kept), pruned.module.get_parameter(kept))
    norm = "input_layernorm.weight"
    assert not torch.equal(result.get_parameter(norm), pruned.module.get_parameter(norm))


def test_training_that_only_hurts_is_thrown_away(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    wild = Reconstruction(epochs=2, learning_rate=50.0)
    result, report = reconstruct(pruned.context, pruned.module, pruned.masked, wild, ALIKE)
    assert report.epochs == 0
    assert report.error_after == report.error_before
    for name, value in pruned.module.named_parameters():
        assert torch.equal(result.get_parameter(name), value)


def test_a_rate_that_is_too_high_falls_by_thirds_until_an_epoch_helps(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    high = replace(KNOBS, learning_rate=0.02 * 81)
    _, report = reconstruct(pruned.context, pruned.module, pruned.masked, high, ALIKE)
    falls = round(math.log(high.learning_rate / report.learning_rate, 3))
    assert 0 < falls < report.epochs
    assert report.learning_rate == pytest.approx(high.learning_rate / 3**falls)
    assert report.error_after < report.error_before


def test_training_that_overflows_is_undone(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    wild = replace(KNOBS, learning_rate=1e30, epochs=2)
    result, report = reconstruct(pruned.context, pruned.module, pruned.masked, wild, ALIKE)
    assert (report.epochs, report.error_after) == (0, report.error_before)
    for name, value in pruned.module.named_parameters():
        assert torch.equal(result.get_parameter(name), value)


def test_reconstructing_twice_gives_the_same_bits(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    first, second = (
        reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)[0] for _ in range(2)
    )
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name))


def test_one_window_cannot_be_held_out_and_trained_on(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path, windows=1)
    with pytest.raises(RecipeError, match="1 of 1 calibration windows out"):
        reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)


def test_scrambled_windows_are_trained_on_and_never_held_out(tmp_path: Path) -> None:
    pruned = pruned_layer(tmp_path)
    run = replace(pruned.context, scrambled=6)
    # Half of the two windows of text, the last one, and not of all eight.
    half = replace(KNOBS, held_out=0.5)
    _, report = reconstruct(run, pruned.module, pruned.masked, half, ALIKE)
    _, usual = reconstruct(pruned.context, pruned.module, pruned.masked, KNOBS, ALIKE)
    assert report.error_before == usual.error_before
    with pytest.raises(RecipeError, match="1 of 1 calibration windows out"):
        reconstruct(replace(run, scrambled=7), pruned.module, pruned.masked, KNOBS, ALIKE)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"epochs": -1}, "epochs -1 must not be negative"),
        ({"batch": 0}, "batch 0"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 must be positive"),
        ({"held_out": 1.0}, "held_out 1.0 must be between 0 and 1"),
    ],
)
def test_knobs_out_of_range_are_named(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Reconstruction(**knobs)  # type: ignore[arg-type]  # the values are the point
