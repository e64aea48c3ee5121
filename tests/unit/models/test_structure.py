"""Tracing finds what belongs together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.chains import TOKENS, WIDTH, Block, Chain, hooked_modules, names

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
# From the published descriptions of the architectures.
KNOWN_GROUPS = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "phi3": (
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "gpt_neox": (
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
}
LAYER_LISTS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_layer_of_a_family_has_its_known_groups(family: str) -> None:
    structure = trace_structure(tiny_model(family), TOKENS)

    layers = TINY_FAMILIES[family]["num_hidden_layers"]
    assert isinstance(layers, int)
    assert names(structure) == [KNOWN_GROUPS[family]] * layers
    prefix = LAYER_LISTS.get(family, "model.layers")
    assert [layer.name for layer in structure.layers] == [f"{prefix}.{i}" for i in range(layers)]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_operator_shapes_are_out_by_in_however_they_are_stored(family: str) -> None:
    model = tiny_model(family)

    for layer in trace_structure(model, TOKENS).layers:
        for operator in layer.operators:
            module = model.get_submodule(layer.full_name(operator))
            shape = (operator.out_features, operator.in_features)
            assert operator.transposed == isinstance(module, Conv1D)
            assert tuple(module.weight.shape) == (shape[::-1] if operator.transposed else shape)
            output = module(torch.zeros(1, 1, operator.in_features))
            assert output.shape[-1] == operator.out_features


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tracing_leaves_no_hook_behind(family: str) -> None:
    model = tiny_model(family)
    before = hooked_modules(model)

    trace_structure(model, TOKENS)

    assert hooked_modules(model) == before


def test_the_window_may_carry_a_batch_dimension_of_one() -> None:
    model = tiny_model("llama")

    assert trace_structure(model, TOKENS[None]) == trace_structure(model, TOKENS)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(4)])
def test_anything_but_one_window_of_ids_is_a_programming_error(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="one window of token ids"):
        trace_structure(tiny_model("llama"), tokens)


def test_a_model_in_training_mode_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="training mode"):
        trace_structure(tiny_model("llama").train(), TOKENS)


def test_one_layer_is_enough() -> None:
    assert names(trace_structure(Chain(Block()), TOKENS)) == [(("up",), ("down",))]


def test_flattened_views_of_one_tensor_are_one_input() -> None:
    class Flattening(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            gate = self.gate(hidden.view(-1, WIDTH)).view(*hidden.shape[:-1], -1)
            return hidden + self.down(gate * self.up(hidden))  # type: ignore[no-any-return]  # nn.Module calls are untyped

    assert names(trace_structure(Chain(Flattening()), TOKENS)) == [(("gate", "up"), ("down",))]


def test_a_tensor_changed_in_place_between_two_operators_is_two_inputs() -> None:
    class InPlace(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            inner = hidden.clone()
            gate = self.gate(inner)
            output: Tensor = hidden + self.down(gate * self.up(inner.relu_()))
            return output

    groups = names(trace_structure(Chain(InPlace()), TOKENS))
    assert groups == [(("gate",), ("up",), ("down",))]


def test_operators_with_equal_but_separate_inputs_are_apart() -> None:
    class Separate(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, hidden: Tensor) -> Tensor:
            output: Tensor = hidden + self.down(self.gate(hidden.clone()) * self.up(hidden))
            return output

    assert names(trace_structure(Chain(Separate()), TOKENS)) == [(("gate",), ("up",), ("down",))]


def test_layers_may_take_keywords_and_return_tuples() -> None:
    class Tuples(Block):
        def forward(self, *, scale: float, states: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # another way to call a layer
            return super().forward(states) * scale, None

    class Calling(Chain):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embedding(tokens)
            for layer in self.layers:
                hidden, _ = layer(scale=2.0, states=hidden)
            output: Tensor = hidden
            return output

    structure = trace_structure(Calling(Tuples(), Tuples()), TOKENS)
    assert names(structure) == [(("up",), ("down",))] * 2


def test_a_list_around_the_backbone_does_not_hide_the_layers() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, hidden: Tensor) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    structure = trace_structure(Chain(Backbone()), TOKENS)
    assert [layer.name for layer in structure.layers] == ["layers.0.layers.0", "layers.0.layers.1"]


def test_a_list_that_the_forward_pass_never_reaches_is_no_matter() -> None:
    model = Chain(Block())
    model.vision = nn.ModuleList([Block(), Block(), Block()])

    assert [layer.name for layer in trace_structure(model, TOKENS).layers] == ["layers.0"]


def test_a_head_tied_to_the_embedding_is_no_matter() -> None:
    model = Chain(Block())
    model.head.weight = model.embedding.weight

    assert len(trace_structure(model, TOKENS).layers) == 1
