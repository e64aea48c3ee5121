"""How the layers are called is captured once and can be replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, run_layer
from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.layer_runs import CPU, ScaledChain, capture, modules_of, windows


def test_moving_a_call_casts_floating_tensors_only() -> None:
    model = tiny_model("gemma2")
    structure = trace_structure(model, windows(1)[0])
    call = capture_layer_calls(model, structure, windows(2))[0]

    moved = call.to(CPU, torch.bfloat16)

    def dtypes(value: object) -> list[torch.dtype]:
        tensors = value if isinstance(value, tuple) else (value,)
        return [tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)]

    assert dtypes(moved.kwargs["position_embeddings"]) == [torch.bfloat16, torch.bfloat16]
    assert dtypes(moved.kwargs["attention_mask"]) == [torch.bool]
    assert dtypes(moved.kwargs["position_ids"]) == [torch.int64]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_local_and_global_attention_layers_have_calls_of_their_own(family: str) -> None:
    model = tiny_model(family)
    structure = trace_structure(model, windows(1)[0])

    calls = capture_layer_calls(model, structure, windows(2))

    local = calls[0]
    alike = [local.first_difference(call) is None for call in calls]
    kinds = TINY_FAMILIES[family]["layer_types"]
    assert isinstance(kinds, list)
    assert alike == [kind == "sliding_attention" for kind in kinds]
    assert all(call.kwargs["past_key_values"] is None for call in calls)


def test_capturing_runs_the_layers_for_two_windows_only() -> None:
    model = tiny_model("llama")
    structure = trace_structure(model, windows(1)[0])
    layers = modules_of(model, structure)
    entered: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: entered.append(index))

    capture_layer_calls(model, structure, windows(6))

    assert entered == [0, 0]  # not even the last layer's body, whose call is all that is needed


def test_windows_of_different_lengths_are_a_programming_error() -> None:
    model = tiny_model("llama")
    structure = trace_structure(model, windows(1)[0])

    with pytest.raises(ValueError, match="one common length"):
        capture_layer_calls(model, structure, [torch.arange(8), torch.arange(9)])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_layer_argument_that_depends_on_the_tokens_is_refused(count: int) -> None:
    class ByToken(ScaledChain):
        def scale(self, tokens: Tensor) -> object:
            return tokens[0, :, None].float()

    model = ByToken()
    structure = trace_structure(model, windows(1)[0])

    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0: argument scale depends on the tokens"
    ):
        capture_layer_calls(model, structure, windows(count))


def test_a_layer_argument_that_cannot_be_replayed_is_refused() -> None:
    class Cache:
        pass

    class Caching(ScaledChain):
        def scale(self, tokens: Tensor) -> object:
            return (Cache(),)

    model = Caching()
    structure = trace_structure(model, windows(1)[0])

    with pytest.raises(UnsupportedModelError, match=r"layers\.0: argument scale is a Cache"):
        capture_layer_calls(model, structure, windows(2))


def test_nested_arguments_are_compared_and_moved() -> None:
    call = LayerCall("layer", (1, [torch.ones(2)]), {"pair": ({"a": torch.zeros(1)}, None)})
    same = LayerCall("layer", (1, [torch.ones(2)]), {"pair": ({"a": torch.zeros(1)}, None)})
    other = LayerCall("layer", (1, [torch.ones(2)]), {"pair": ({"a": torch.ones(1)}, None)})
    fewer = LayerCall("layer", (1, [torch.ones(2)]), {})

    assert call.first_difference(same) is None
    assert call.first_difference(other) == "pair"
    assert call.first_difference(fewer) == fewer.first_difference(call) == "pair"
    halved = call.to(CPU, torch.float16)
    assert halved.first_difference(call) == "2"
    assert halved.to(CPU, torch.float32).first_difference(call) is None


def test_hidden_states_given_by_keyword_are_replayed_by_keyword() -> None:
    class ByKeyword(ScaledChain):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embedding(tokens)
            for layer in self.layers:
                hidden = layer(hidden=hidden, scale=0.5)
            output: Tensor = hidden
            return output

    model = ByKeyword()
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    hidden = captured.hidden[1]
    for layer, call in zip(modules_of(model, structure), captured.calls, strict=True):
        hidden = run_layer(layer, hidden, call)

    assert torch.equal(hidden, model(windows(2)[1][None]))
