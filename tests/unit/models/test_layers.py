"""Layers run one at a time do what they do inside the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import NumericalError
from sparseserve.models.layers import (
    capture_layer_calls,
    copy_layer,
    entering_states,
    group_input,
    group_inputs,
    layer_inputs,
    layer_weight,
    run_layer,
    set_layer_weight,
)
from sparseserve.models.structure import OperatorGroup, trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.layer_runs import (
    CPU,
    LENGTH,
    Scaled,
    ScaledChain,
    capture,
    modules_of,
    seen_in_the_model,
    windows,
)


@pytest.fixture(params=TINY_FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def test_a_chain_of_layers_gives_the_hidden_states_of_the_model(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    names = [layer.name for layer in structure.layers]
    texts = windows(4)  # the last two play no part in capturing the calls
    captured = capture(model, structure, texts)

    for window, hidden in zip(texts, captured.hidden, strict=True):
        expected = seen_in_the_model(model, names, window)
        layers = zip(names, modules_of(model, structure), captured.calls, strict=True)
        states = hidden
        for name, layer, call in layers:
            torch.testing.assert_close(states, expected[name][0], rtol=0, atol=1e-6)
            states = run_layer(layer, states, call)
            torch.testing.assert_close(states, expected[name][1], rtol=0, atol=1e-6)


def test_calls_captured_from_some_windows_serve_all_others(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    calls = capture_layer_calls(model, structure, windows(1))
    others = windows(2, seed=9)
    last = structure.layers[-1].name

    entering = list(entering_states(model, structure, others))
    for window, hidden in zip(others, entering, strict=True):
        states = hidden
        for layer, call in zip(modules_of(model, structure), calls, strict=True):
            states = run_layer(layer, states, call)
        expected = seen_in_the_model(model, [last], window)[last][1]
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


def test_group_inputs_are_what_the_operators_see_in_the_model(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(3))
    layer, call, found = structure.layers[0], captured.calls[0], captured.hidden[2]
    module = model.get_submodule(layer.name)
    seen = seen_in_the_model(
        model, [layer.full_name(operator) for operator in layer.operators], windows(3)[2]
    )

    at_once, output = layer_inputs(module, found, call, layer.groups)

    assert torch.equal(output, run_layer(module, found, call))
    for group, inputs in zip(layer.groups, at_once, strict=True):
        assert inputs.shape == (LENGTH, group.in_features)
        assert torch.equal(inputs, group_input(module, found, call, group))
        for operator in group.operators:
            expected = seen[layer.full_name(operator)][0].reshape(LENGTH, -1)
            torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)


def test_the_inputs_of_all_groups_are_had_without_running_the_last(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(1))
    layer, call, hidden = structure.layers[0], captured.calls[0], captured.hidden[0]
    module = copy_layer(model.get_submodule(layer.name))
    expected, _ = layer_inputs(module, hidden, call, layer.groups)

    def refuse(*_: object) -> None:
        raise AssertionError("the last group ran")

    # After its inputs are recorded, an operator that runs ends here.
    module.get_submodule(layer.groups[-1].operators[0].name).register_forward_hook(refuse)
    found = group_inputs(module, hidden, call, layer.groups)

    assert len(found) == len(expected)
    for inputs, other in zip(found, expected, strict=True):
        assert torch.equal(inputs, other)


def test_an_operator_is_a_product_with_its_layer_weight(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    layer = structure.layers[0]
    module = model.get_submodule(layer.name)
    inputs, _ = layer_inputs(module, captured.hidden[0], captured.calls[0], layer.groups)

    for group, x in zip(layer.groups, inputs, strict=True):
        for operator in group.operators:
            linear = module.get_submodule(operator.name)
            weight = layer_weight(module, operator)
            assert weight.shape == (operator.out_features, operator.in_features)
            bias = torch.zeros(operator.out_features) if linear.bias is None else linear.bias
            torch.testing.assert_close(linear(x), x @ weight.T + bias)


def test_a_new_weight_changes_the_operator_as_a_plain_product_says(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    layer = structure.layers[0]
    module = copy_layer(model.get_submodule(layer.name), dtype=torch.float64)
    hidden, call = captured.hidden[0].double(), captured.calls[0].to(CPU, torch.float64)
    generator = torch.Generator().manual_seed(5)

    for group in layer.groups:
        x = group_input(module, hidden, call, group)
        for operator in group.operators:
            linear = module.get_submodule(operator.name)
            before = linear(x)
            weight = layer_weight(module, operator)
            change = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            set_layer_weight(module, operator, weight + change)
            torch.testing.assert_close(linear(x) - before, x @ change.T)


def test_writing_a_weight_back_changes_nothing(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    for layer, module in zip(structure.layers, modules_of(model, structure), strict=True):
        for operator in layer.operators:
            set_layer_weight(module, operator, layer_weight(module, operator).clone())

    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_copy_runs_in_another_dtype_and_leaves_the_model_alone(model: PreTrainedModel) -> None:
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    layer, module = structure.layers[0], modules_of(model, structure)[0]
    hidden, call = captured.hidden[0], captured.calls[0]
    expected = run_layer(module, hidden, call)

    double = copy_layer(module, CPU, torch.float64)
    output = run_layer(double, hidden.double(), call.to(CPU, torch.float64))
    for operator in layer.operators:
        set_layer_weight(double, operator, torch.zeros_like(layer_weight(double, operator)))

    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run_layer(module, hidden, call), expected)


def test_a_layer_that_works_in_place_leaves_its_caller_s_tensors_alone() -> None:
    class InPlace(Scaled):
        def forward(self, hidden: Tensor, scale: object) -> Tensor:
            output = super().forward(hidden, scale)
            return hidden.copy_(output)

    model = ScaledChain()
    model.layers = nn.ModuleList([InPlace(), InPlace()])
    model.eval().requires_grad_(False)
    window = windows(1)[0]
    structure = trace_structure(model, window)
    captured = capture(model, structure, [window, window.flip(0)])
    hidden, layer = captured.hidden[0], structure.layers[0]

    assert torch.equal(hidden, model.embedding(window[None]))
    before = hidden.clone()
    inputs, _ = layer_inputs(model.layers[0], hidden, captured.calls[0], layer.groups)
    assert torch.equal(hidden, before)
    assert torch.equal(inputs[0], before[0])


def test_a_weight_of_another_shape_is_a_programming_error() -> None:
    model = tiny_model("gpt2")
    layer = trace_structure(model, windows(1)[0]).layers[0]
    operator = layer.operators[0]
    stored = torch.zeros(operator.in_features, operator.out_features)

    with pytest.raises(ValueError, match=r"attn\.c_attn takes a weight of \(192, 64\)"):
        set_layer_weight(model.get_submodule(layer.name), operator, stored)


def test_a_weight_is_cast_to_the_dtype_it_is_stored_in() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    layer = trace_structure(model, windows(1)[0]).layers[0]
    module, operator = model.get_submodule(layer.name), layer.operators[0]
    weight = torch.full((operator.out_features, operator.in_features), 1 / 3)

    set_layer_weight(module, operator, weight)

    assert torch.equal(layer_weight(module, operator), weight.bfloat16())


def _hooked(module: nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_by_layer(poison: float) -> None:
    model = tiny_model("llama")
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    layer = structure.layers[1]
    module, call, hidden = model.get_submodule(layer.name), captured.calls[1], captured.hidden[0]
    queries: OperatorGroup = layer.groups[0]

    layer_weight(module, layer.operators[-1])[0, 0] = poison
    with pytest.raises(NumericalError, match=r"model\.layers\.1: its output has \d+ NaN"):
        run_layer(module, hidden, call)

    bad = hidden.clone()
    bad[0, 3, 5] = poison
    message = r"model\.layers\.1: the input of self_attn\.q_proj has \d+ NaN"
    with pytest.raises(NumericalError, match=message):
        group_input(module, bad, call, queries)
    assert not _hooked(module)


def test_an_embedding_that_is_not_finite_is_named_with_its_window() -> None:
    model = tiny_model("llama")
    texts = [torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)]
    texts.append(torch.full((8,), 7))
    structure = trace_structure(model, texts[0])
    model.get_submodule("model.embed_tokens").weight[7] = float("nan")

    with pytest.raises(NumericalError, match=r"model\.layers\.0: .* entering it \(window 2\)"):
        list(entering_states(model, structure, texts))


def test_group_input_leaves_no_hook_behind_and_runs_nothing_after_the_group() -> None:
    model = tiny_model("llama")
    structure = trace_structure(model, windows(1)[0])
    captured = capture(model, structure, windows(2))
    layer = structure.layers[0]
    module = copy_layer(model.get_submodule(layer.name))
    ran: list[str] = []
    counters = [
        module.get_submodule(operator.name).register_forward_hook(
            lambda *_, name=operator.name: ran.append(name)
        )
        for operator in layer.operators
    ]

    group_input(module, captured.hidden[0], captured.calls[0], layer.groups[1])

    assert ran == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    for counter in counters:
        counter.remove()
    assert not _hooked(module)
