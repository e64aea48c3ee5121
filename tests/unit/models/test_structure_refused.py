"""Models that tracing refuses, each with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sparseserve.testing import TINY_VOCABULARY
from tests.unit.models.chains import WIDTH, Block, Chain, refusal


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


def test_a_model_most_of_whose_layers_would_stay_dense_is_refused_with_its_largest_matrix() -> None:
    class Stacked(Block):
        """A layer with experts that transformers does not run."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.zeros(5, WIDTH, WIDTH))

    message = refusal(Chain(Stacked(), Stacked()))
    assert message.startswith("56% of the decoder layers' weights would stay dense, such as ")
    assert "layers.0.experts [5, 16, 16]; at most 50% may" in message


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
