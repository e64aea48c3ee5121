"""Features of hidden states weigh as much as what comes after them reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseserve.models.reading import reading_weights
from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.layer_runs import seen_in_the_model, windows


def outputs_of_layers(model: PreTrainedModel, window: Tensor) -> list[Tensor]:
    """Return what leaves each layer, ``[T, hidden]``."""
    names = [layer.name for layer in trace_structure(model, window).layers]
    seen = seen_in_the_model(model, names, window)
    return [seen[name][1][0] for name in names]


def median_energy(hidden: Tensor) -> Tensor:
    return hidden.square().mean(dim=-1).median()


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma3_text", 1.0)])
def test_they_are_the_squared_weights_of_the_normalisations_to_come(
    family: str, offset: float
) -> None:
    model, window = tiny_model(family), windows(1)[0]
    norms = [layer.input_layernorm for layer in model.model.layers[1:]] + [model.model.norm]
    readers = [
        (norm.weight + offset).square() / median_energy(output)
        for norm, output in zip(norms, outputs_of_layers(model, window), strict=True)
    ]
    found = reading_weights(model, trace_structure(model, window), window)
    assert len(found) == len(readers)
    for number, weights in enumerate(found):
        expected = torch.stack(readers[number:]).sum(dim=0)
        torch.testing.assert_close(weights / weights.mean(), expected / expected.mean())


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_they_leave_the_energy_of_the_tokens_as_it_is(family: str) -> None:
    model, window = tiny_model(family), windows(1)[0]
    found = reading_weights(model, trace_structure(model, window), window)
    for weights, hidden in zip(found, outputs_of_layers(model, window), strict=True):
        assert (weights >= 0).all()
        energy = hidden.square().sum(dim=-1)
        weighted = (weights * hidden.square()).sum(dim=-1) / energy
        assert float(weighted.mean()) == pytest.approx(1, rel=1e-4)


def test_a_feature_that_nothing_reads_weighs_nothing() -> None:
    model, window = tiny_model("llama"), windows(1)[0]
    with torch.no_grad():
        for norm in (model.model.layers[1].input_layernorm, model.model.norm):
            norm.weight[5] = 0
    first, last = reading_weights(model, trace_structure(model, window), window)
    for weights in (first, last):
        assert weights[5] == 0
        assert (torch.cat([weights[:5], weights[6:]]) > 0).all()


def test_without_a_reader_all_features_weigh_alike() -> None:
    decoder, window = tiny_model("llama").model, windows(1)[0]
    found = reading_weights(decoder, trace_structure(decoder, window), window)
    assert torch.equal(found[-1], torch.ones(64))
    assert not torch.equal(found[0], torch.ones(64))
