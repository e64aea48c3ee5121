"""Models that tracing refuses, each with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_VOCABULARY
from tests.unit.models.chains import TOKENS, WIDTH, Block, Chain, names, refusal


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


class Stacked(Block):
    """A layer with experts that transformers does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, WIDTH, WIDTH))


def test_experts_that_transformers_does_not_run_are_refused() -> None:
    message = refusal(Chain(Stacked(), Stacked()))
    assert "layers.0: experts [4, 16, 16] stacks the matrices of 4 experts or heads" in message


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
