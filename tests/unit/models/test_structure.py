"""Tracing: what belongs together is found, and what does not fit is refused with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sparseserve.errors import UnsupportedModelError
from sparseserve.models import ModelStructure, trace_structure
from sparseserve.testing import TINY_FAMILIES, TINY_VOCABULARY, tiny_model

TOKENS = torch.arange(12)
WIDTH = 16

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


class Block(nn.Module):
    """A feed-forward layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.down(torch.relu(self.up(hidden)))
        return output


class Chain(nn.Module):
    """An embedding, a list of layers and a head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TINY_VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, TINY_VOCABULARY)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def names(structure: ModelStructure) -> list[tuple[tuple[str, ...], ...]]:
    return [
        tuple(tuple(operator.name for operator in group.operators) for group in layer.groups)
        for layer in structure.layers
    ]


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        trace_structure(model, TOKENS)
    message = str(caught.value)
    assert "\n" not in message
    assert not hooked_modules(model)
    return message


def hooked_modules(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


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


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(TINY_VOCABULARY, WIDTH)
            self.first, self.second = Block(), Block()

        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.second(self.first(self.embedding(tokens)))
            return output

    assert "Plain: no decoder layers found" in refusal(Plain().eval())


class Looping(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + super().forward(tokens)


class Backwards(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Skipping(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers[0](self.embedding(tokens))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Scaling(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden) * 2
        return hidden  # type: ignore[no-any-return]  # nn.Module calls are untyped


class ScalingInPlace(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden.mul_(2)
        return hidden  # type: ignore[no-any-return]  # nn.Module calls are untyped


class Parallel(Chain):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return torch.stack([layer(hidden) for layer in self.layers])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Looping, "layers.0 was call 3 of its list: layers must run once each, in order"),
        (Backwards, "layers.1 was call 1 of its list: layers must run once each, in order"),
        (Skipping, "layers.1 was not called"),
        (Scaling, "layers.1 does not receive the output of layers.0 unchanged"),
        (ScalingInPlace, "layers.1 does not receive the output of layers.0 unchanged"),
        (Parallel, "layers.1 does not receive the output of layers.0 unchanged"),
    ],
)
def test_layers_that_are_not_a_plain_chain_are_refused(kind: type[Chain], reason: str) -> None:
    assert f"{kind.__name__}: {reason}" in refusal(kind(Block(), Block()))


def test_a_layer_used_again_under_another_number_is_refused() -> None:
    layer = Block()

    assert "layers holds the same layer more than once" in refusal(Chain(layer, layer))


def test_a_small_sound_list_does_not_stand_in_for_a_larger_unsound_one() -> None:
    class Adapted(Scaling):
        def __init__(self) -> None:
            super().__init__(Block(), Block())
            self.adapter = nn.ModuleList([Block()])

        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.adapter[0](super().forward(tokens))
            return output

    assert "layers.1 does not receive" in refusal(Adapted().eval())


def test_an_operator_called_twice_in_its_layer_is_refused() -> None:
    class Twice(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(super().forward(hidden))

    assert "layers.0: up is called more than once" in refusal(Chain(Twice()))


def test_an_operator_that_its_layer_never_calls_is_refused() -> None:
    class Idle(Block):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(WIDTH, WIDTH)

    message = refusal(Chain(Idle(), Idle()))
    assert "layers.0: spare is not called" in message
    assert "1 of 3" in message


def test_an_operator_called_from_outside_its_layer_is_refused() -> None:
    class Borrowing(Chain):
        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.layers[0].get_submodule("up")(super().forward(tokens))
            return output

    model = Borrowing(Block(), Block())
    model.head = nn.Linear(WIDTH, WIDTH)
    assert "layers.0: up is called from outside its layer" in refusal(model)


def test_an_operator_shared_between_layers_is_refused() -> None:
    model = Chain(Block(), Block())
    model.layers[1].up = model.layers[0].up

    assert "layers.0: up shares its weight with layers.1.up.weight" in refusal(model)


def test_a_weight_shared_between_layers_is_refused() -> None:
    model = Chain(Block(), Block())
    model.layers[1].get_submodule("up").weight = model.layers[0].get_submodule("up").weight

    assert "layers.0: up shares its weight with layers.1.up.weight" in refusal(model)


def test_an_operator_tied_to_the_embedding_is_refused() -> None:
    model = Chain(Block())
    model.layers[0].up = nn.Linear(WIDTH, TINY_VOCABULARY)
    model.layers[0].down = nn.Linear(TINY_VOCABULARY, WIDTH)
    model.layers[0].get_submodule("up").weight = model.embedding.weight

    assert "layers.0: up shares its weight with the embedding embedding" in refusal(model)


def test_a_head_tied_to_the_embedding_is_no_matter() -> None:
    model = Chain(Block())
    model.head.weight = model.embedding.weight

    assert len(trace_structure(model, TOKENS).layers) == 1


def test_experts_that_see_some_tokens_only_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

        def forward(self, hidden: Tensor) -> Tensor:
            halves = hidden.chunk(2, dim=1)
            return torch.cat([e(x) for e, x in zip(self.experts, halves, strict=True)], dim=1)

    message = refusal(Chain(Routed(), Routed()))
    assert "layers.0: experts.0 sees 6 rows for 12 tokens; mixtures of experts" in message


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}),
    ],
)
def test_mixtures_of_experts_are_refused_as_such(family: str, settings: dict[str, int]) -> None:
    config = AutoConfig.for_model(family, **TINY_FAMILIES["llama"], **settings)
    model = AutoModelForCausalLM.from_config(config).eval()

    message = refusal(model)
    assert "model.layers.0: mlp.experts." in message
    assert "stacks the matrices of 4 experts" in message


class Mixing(Block):
    """A layer with a matrix of ``rows`` rows beside its 1024 linear weights."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(rows, WIDTH))


def test_a_layer_with_much_of_its_weight_outside_linear_operators_is_refused() -> None:
    message = refusal(Chain(Mixing(8)))

    assert "layers.0: 11% of its weights, such as mix [8, 16], lie outside" in message
    assert "at most 10% may" in message


def test_a_small_matrix_such_as_a_router_may_stay_dense() -> None:
    assert names(trace_structure(Chain(Mixing(4)), TOKENS)) == [(("up",), ("down",))]


def test_a_quantised_operator_is_refused() -> None:
    class Quantised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, 2 * WIDTH)
            whole = torch.ones(2 * WIDTH, WIDTH, dtype=torch.int8)
            self.weight = nn.Parameter(whole, requires_grad=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, self.weight.float(), self.bias)

    model = Chain(Block())
    model.layers[0].up = Quantised()

    assert "layers.0: the weight of up is (32, 16) of torch.int8; quantised" in refusal(model)


def test_a_parametrised_operator_is_refused() -> None:
    model = Chain(Block())
    parametrizations.weight_norm(model.layers[0].get_submodule("up"))

    assert "layers.0: up (ParametrizedLinear) has no plain weight parameter" in refusal(model)
