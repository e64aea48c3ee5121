"""What makes channels is found by what a layer does, and scaling them changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.channel_sources import find_channel_sources
from sparseserve.models.structure import trace_structure
from sparseserve.testing import EXPERT_TINY_FAMILIES, TINY_FAMILIES, tiny_model

WINDOW = torch.arange(10, 18)
IDS = torch.arange(30, 60)[None]
NORMS = ["input_layernorm", "post_attention_layernorm"]
# What makes the channels of each family's first layer, with what its norm adds to its gain.
SOURCES = {
    "llama": [*((name, 0.0) for name in NORMS), ("mlp.up_proj", 0.0)],
    "gemma3_text": [
        ("input_layernorm", 1.0),
        ("pre_feedforward_layernorm", 1.0),
        ("mlp.up_proj", 0.0),
    ],
    "gpt2": [("ln_1", 0.0), ("ln_2", 0.0)],  # GELU lies between the operators of its MLP
    "opt": [("self_attn_layer_norm", 0.0), ("self_attn.v_proj", 0.0)],
    "phi3": [*((name, 0.0) for name in NORMS), ("mlp.gate_up_proj", 0.0)],
}


def factors(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.exp2(torch.randint(-3, 4, (width,), generator=generator).float())


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *EXPERT_TINY_FAMILIES])
def test_scaling_every_channel_leaves_the_predictions(family: str) -> None:
    model = with_random_vectors(tiny_model(family))
    with unstacked_experts(model), torch.no_grad():
        expected = model(IDS).logits
        structure = trace_structure(model, WINDOW)
        found = find_channel_sources(model, structure, WINDOW)
        assert all(found)
        for layer, sources in zip(structure.layers, found, strict=True):
            for source in sources:
                width = source.group.in_features
                source.scale(model.get_submodule(layer.name), factors(width))
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-5)
        for source in found[0]:
            module = model.get_submodule(structure.layers[0].name)
            before = model(IDS).logits
            source.divide(module, factors(source.group.in_features))
            assert float((model(IDS).logits - before).abs().max()) > 1e-3


@pytest.mark.parametrize("family", SOURCES)
def test_norms_and_operators_before_a_product_are_found(family: str) -> None:
    model = with_random_vectors(tiny_model(family))
    found = find_channel_sources(model, trace_structure(model, WINDOW), WINDOW)
    for name, offset in SOURCES[family]:
        assert (name, offset) in [(source.module, source.offset) for source in found[0]]
    if family == "phi3":
        assert [source.start for source in found[0]] == [0, 0, found[0][-1].group.in_features]


def test_what_two_layers_share_is_left() -> None:
    model = tiny_model("llama")
    layers = model.get_submodule("model.layers")
    layers[1].input_layernorm = layers[0].input_layernorm
    found = find_channel_sources(model, trace_structure(model, WINDOW), WINDOW)
    assert [[source.module for source in sources] for sources in found] == [
        ["post_attention_layernorm", "mlp.up_proj"]
    ] * 2


def test_a_norm_that_something_else_reads_is_left() -> None:
    class Leaking(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, hidden: Tensor) -> Tensor:
            normal: Tensor = self.norm(hidden)
            return normal + 0.1 * normal.flip(-1)

    model = tiny_model("llama")
    layer = model.get_submodule("model.layers.0")
    layer.input_layernorm = Leaking(layer.get_submodule("input_layernorm"))
    found = find_channel_sources(model, trace_structure(model, WINDOW), WINDOW)
    assert "input_layernorm.norm" not in [source.module for source in found[0]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_columns_are_multiplied_by_what_a_gain_stored_in_16_bits_divides_by(family: str) -> None:
    model = with_random_vectors(tiny_model(family))
    structure = trace_structure(model, WINDOW)
    expected = model(IDS).logits
    for layer, sources in zip(
        structure.layers, find_channel_sources(model, structure, WINDOW), strict=True
    ):
        module = model.get_submodule(layer.name)
        for source in sources:
            wanted = 1 + 0.37 * torch.arange(source.group.in_features) % 5
            source.scale(module, wanted, torch.bfloat16)
            if source.operator is None:
                gain = module.get_parameter(f"{source.module}.weight")
                assert torch.equal(gain, gain.bfloat16().float())
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-5)


def with_random_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """Give norms and biases other values than one and zero, which would hide a mistake."""
    generator = torch.Generator().manual_seed(5)
    for vector in (each for each in model.parameters() if each.dim() == 1):
        vector.data += 0.3 * torch.rand(vector.shape, generator=generator)
    return model
