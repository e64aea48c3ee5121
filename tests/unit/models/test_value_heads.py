"""Values of attention are found by what a layer does, and rotating them changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.structure import trace_structure
from sparseserve.models.value_heads import find_value_heads
from sparseserve.testing import EXPERT_TINY_FAMILIES, TINY_FAMILIES, tiny_model

WINDOW = torch.arange(10, 18)
IDS = torch.arange(30, 60)[None]
# Their heads of query, key and value alternate; their values pass a norm with gains.
WITHOUT = {"gpt_neox", "deepseek_v3"}
FAMILIES = [name for name in (*TINY_FAMILIES, *EXPERT_TINY_FAMILIES) if name not in WITHOUT]


def random_rotations(heads: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    matrices = torch.randn(heads, width, width, dtype=torch.float64, generator=generator)
    rotations: Tensor = torch.linalg.qr(matrices).Q
    return rotations


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_of_every_head_leaves_the_predictions(family: str) -> None:
    model = tiny_model(family)
    with unstacked_experts(model), torch.no_grad():
        expected = model(IDS).logits
        structure = trace_structure(model, WINDOW)
        found = find_value_heads(model, structure, WINDOW)
        assert len(found) == len(structure.layers)
        for layer, places in zip(structure.layers, found, strict=True):
            (place,) = places
            module = model.get_submodule(layer.name)
            # Bias and all: rows of values that are zero would hide a mistake.
            bias = getattr(module.get_submodule(place.values.name), "bias", None)
            assert bias is None or bool((bias != 0).any())
            place.rotate(module, random_rotations(place.heads, place.width))
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-5)
        assert place.width == head_width(model)
        place.rotate_values(module, random_rotations(place.heads, place.width))
        assert float((model(IDS).logits - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_values_that_a_later_layer_reads_too_are_left(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        structure = trace_structure(model, WINDOW)
        for layer, places in zip(
            structure.layers, find_value_heads(model, structure, WINDOW), strict=True
        ):
            for place in places:
                rotations = random_rotations(place.heads, place.width)
                place.rotate(model.get_submodule(layer.name), rotations)
        found = model(IDS, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def head_width(model: PreTrainedModel) -> int:
    config = model.config
    whole: int = config.hidden_size // config.num_attention_heads
    return getattr(config, "head_dim", None) or whole


@pytest.mark.parametrize("family", sorted(WITHOUT))
def test_a_layer_whose_values_cannot_be_turned_alone_is_left(family: str) -> None:
    model = tiny_model(family)
    with unstacked_experts(model):
        found = find_value_heads(model, trace_structure(model, WINDOW), WINDOW)
    assert not any(found)


class Gated(nn.Module):
    """An operator behind the attention that its values must not be turned for."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.gains = nn.Parameter(torch.linspace(0.5, 2, width))

    def forward(self, states: Tensor) -> Tensor:
        values: Tensor = self.inner(states)
        return values * self.gains


def test_gains_between_values_and_what_reads_them_are_noticed() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = Gated(attention.v_proj, attention.v_proj.out_features)
    found = find_value_heads(model, trace_structure(model, WINDOW), WINDOW)
    assert [len(places) for places in found] == [0, 1]


def test_values_that_change_nothing_are_not_rotated() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    found = find_value_heads(model, trace_structure(model, WINDOW), WINDOW)
    assert [len(places) for places in found] == [1, 0]


def test_looking_for_them_changes_no_weight() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_value_heads(model, trace_structure(model, WINDOW), WINDOW)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
