"""A divergence that rounding would push below zero is zero."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sparseserve.layerwise.reconstruction import PredictionError, reconstruct
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.steps import Reconstruction
from sparseserve.retraining.losses import (
    Example,
    dense_predictions,
    mean_divergence,
    prediction_loss,
)
from sparseserve.testing import tiny_model


def dense_context(folder: Path) -> LayerContext:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (24,), generator=generator) for _ in range(3)]
    structure = trace_structure(model, texts[0])
    calls = capture_layer_calls(model, structure, texts)
    streams = HiddenStreams.start(
        folder,
        entering_states(model, structure, texts),
        dense=True,
        chained=False,
        keep_inputs=False,
    )
    layer = structure.layers[0]
    return streams.enter(model.get_submodule(layer.name), layer, calls[0], torch.device("cpu"))


def test_a_layer_that_differs_by_rounding_alone_has_no_negative_error(tmp_path: Path) -> None:
    context = dense_context(tmp_path / "streams")
    generator = torch.Generator().manual_seed(2)
    shifted = copy_layer(context.module)
    for parameter in shifted.parameters():
        parameter.mul_(1 + 1e-6)
    knobs = Reconstruction(epochs=1, learning_rate=1e-9)
    for _ in range(20):
        head = torch.randn(64, 40, generator=generator) / 1e4
        error = PredictionError(partial(torch.matmul, other=head))
        _, report = reconstruct(context, shifted, [], knobs, error)
        assert report.error_before >= 0
        assert report.error_after >= 0


def test_no_mean_divergence_of_almost_equal_predictions_is_below_zero() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(200):
        expected = (torch.randn(7, 300, generator=generator) * 3).log_softmax(dim=-1)
        noise = torch.randn(expected.shape, generator=generator) * 1e-7
        assert float(mean_divergence(expected, expected + noise)) >= 0


def test_a_model_compared_with_itself_diverges_by_no_less_than_nothing() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    windows = [torch.randint(0, 256, (24,), generator=generator) for _ in range(12)]
    predictions = tuple(dense_predictions(model, windows, 300))
    # As another device rounds.
    model.lm_head.weight.data.mul_(1 + 1e-6)
    losses = [
        float(prediction_loss(model, Example(window, dense), 1.0).total)
        for window, dense in zip(windows, predictions, strict=True)
    ]
    assert min(losses) >= 0
    assert max(losses) < 1e-5
