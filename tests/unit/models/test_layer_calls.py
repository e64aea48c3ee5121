"""How the layers are called is captured once and can be replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.layerwise.layer_calls import VaryingArguments
from sparseserve.models.hooks import run_model
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, entering_states, run_layer
from sparseserve.models.structure import ModelStructure, trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.layer_runs import (
    CPU,
    LENGTH,
    ScaledChain,
    capture,
    modules_of,
    windows,
)

# What layers are handed their cache as, by older and by newer releases of transformers.
CACHES = ("past_key_values", "cache")


def test_moving_a_call_casts_floating_tensors_only() -> None:
    model = tiny_model("gemma2")
    structure = trace_structure(model, windows(1)[0])
    call = capture_layer_calls(model, structure, windows(2))[0]

    moved = call.to(CPU, torch.bfloat16)

    def dtypes(value: object) -> list[torch.dtype]:
        tensors = value if isinstance(value, tuple) else (value,)
        return [tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)]

    assert dtypes(moved.kwargs["position_embeddings"]) == [torch.bfloat16, torch.bfloat16]
    mask = call.kwargs["attention_mask"]  # of 0 and -inf, or of bool, as transformers likes
    assert isinstance(mask, Tensor)
    expected = torch.bfloat16 if mask.is_floating_point() else torch.bool
    assert dtypes(moved.kwargs["attention_mask"]) == [expected]
    assert dtypes(moved.kwargs["position_ids"]) == [torch.int64]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_local_and_global_attention_layers_have_calls_of_their_own(family: str) -> None:
    model = tiny_model(family)
    structure = trace_structure(model, windows(1)[0])

    calls = capture_layer_calls(model, structure, windows(2))

    def seen(mask: object) -> int:
        """Count the pairs of a token and one that it sees; without a mask, those in order."""
        if not isinstance(mask, Tensor):
            return LENGTH * (LENGTH + 1) // 2
        return int((mask if mask.dtype == torch.bool else mask == 0).sum())

    # Nothing hides tokens of a short window from global attention but their order.
    local = [seen(call.kwargs["attention_mask"]) < seen(None) for call in calls]
    kinds = TINY_FAMILIES[family]["layer_types"]
    assert isinstance(kinds, list)
    assert local == [kind == "sliding_attention" for kind in kinds]
    assert all(call.kwargs.get(name) is None for call in calls for name in CACHES)


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


class ByToken(ScaledChain):
    """Its layers are scaled by numbers that the tokens decide."""

    def scale(self, tokens: Tensor) -> object:
        return tokens[0, :, None].float() / 100


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_argument_that_depends_on_the_tokens_is_known_as_such(count: int) -> None:
    model = ByToken()
    structure = trace_structure(model, windows(1)[0])

    for call in capture_layer_calls(model, structure, windows(count)):
        assert call.varying == ("scale",)
        [scale] = call.varying_tensors()
        assert scale.equal(windows(1)[0][:, None].float() / 100)


def test_an_argument_of_another_form_for_other_tokens_is_refused() -> None:
    class Shrinking(ScaledChain):
        def scale(self, tokens: Tensor) -> object:
            return torch.ones(()) if tokens[0, 0] % 2 else torch.ones(1)

    model = Shrinking()
    structure = trace_structure(model, torch.tensor([1, 2, 3]))

    with pytest.raises(UnsupportedModelError, match=r"layers\.0: argument scale has another form"):
        capture_layer_calls(model, structure, [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])])


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "llama"])
def test_layers_run_alone_give_what_the_model_gives_whatever_they_are_handed(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    texts = windows(4)
    structure = trace_structure(model, texts[0])
    calls = capture_layer_calls(model, structure, texts)
    assert any(call.varying for call in calls) == (family != "llama")
    varying = VaryingArguments.record(tmp_path, model, structure, calls, texts).without_first(1)
    for number, text in enumerate(texts[1:]):
        [hidden] = entering_states(model, structure, [text])
        for layer, call in zip(structure.layers, calls, strict=True):
            own = varying.calls(layer.name, call)[number]
            hidden = run_layer(model.get_submodule(layer.name), hidden, own)
        assert hidden.equal(leaving_states(model, structure, text))


def leaving_states(model: nn.Module, structure: ModelStructure, text: Tensor) -> Tensor:
    found: list[Tensor] = []
    last = model.get_submodule(structure.layers[-1].name)
    handle = last.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(text[None], use_cache=False)
    handle.remove()
    return found[0]


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

    assert call.compared(same).varying == ()
    assert call.compared(other).varying == ("pair",)
    for one, another in ((call, fewer), (fewer, call)):
        with pytest.raises(UnsupportedModelError, match="layer: argument pair has another form"):
            one.compared(another)
    halved = call.to(CPU, torch.float16)
    with pytest.raises(UnsupportedModelError, match="layer: argument 2 has another form"):
        halved.compared(call)
    assert halved.to(CPU, torch.float32).compared(call).varying == ()


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


def test_products_of_sixteen_bits_are_those_of_float32_rounded() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).to(torch.bfloat16)
    states = torch.randn(40, 64).to(torch.bfloat16)
    found: list[Tensor] = []

    class Model(nn.Module):
        def forward(self, tokens: Tensor) -> None:
            found.extend((layer(states), states @ layer.weight, states.float() @ states.T.float()))

    run_model(Model().eval(), torch.zeros(1, 40, dtype=torch.int64))
    weight, bias = layer.weight.float(), layer.bias.float()
    exact = nn.functional.linear(states.float(), weight, bias)
    assert found[0].equal(exact.to(torch.bfloat16))
    assert found[1].equal((states.float() @ weight).to(torch.bfloat16))
    assert found[2].dtype == torch.float32
