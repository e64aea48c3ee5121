"""Layers that return more than hidden states, as those of Bamba and RWKV do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparseserve.models.prediction import prediction_head
from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_VOCABULARY, tiny_model
from tests.unit.models.layer_runs import CPU, seen_in_the_model, windows

SIZES: dict[str, object] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
MANY: dict[str, dict[str, object]] = {
    "bamba": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
    },
    "rwkv": {"attention_hidden_size": 64, "intermediate_size": 128, "context_length": 64},
}


def model_of(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **SIZES, **MANY[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    found: PreTrainedModel = model.eval().requires_grad_(False)
    return found


@pytest.mark.parametrize("family", MANY)
def test_what_follows_layers_of_several_outputs_is_predicted_as_in_the_model(family: str) -> None:
    model, (first, second) = model_of(family), windows(2)
    structure = trace_structure(model, first)
    head = prediction_head(model, structure, first[:8], CPU)
    assert head is not None
    last = structure.layers[-1].name
    hidden = seen_in_the_model(model, [last], second)[last][1].reshape(1, len(second), -1)
    with torch.no_grad():
        expected = model(second[None], use_cache=False).logits
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=1e-5)


class _Extra(nn.Module):
    """A layer whose second output the model needs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        output: Tensor = self.layer(hidden, **rest)
        return output, output.mean()


def test_a_model_that_needs_more_than_the_hidden_states_has_no_head_and_stays_whole() -> None:
    model, window = tiny_model("llama"), windows(1)[0]
    layers = model.model.layers
    layers[1] = _Extra(layers[1])
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0][0] * args[0][1].sign(),))
    structure = trace_structure(tiny_model("llama"), window)
    names = ("model.layers.0", "model.layers.1")
    structure = replace(
        structure,
        layers=tuple(
            replace(layer, name=name) for layer, name in zip(structure.layers, names, strict=True)
        ),
    )
    before = dict(model.named_modules())
    assert prediction_head(model, structure, window[:8], CPU) is None
    assert dict(model.named_modules()) == before
