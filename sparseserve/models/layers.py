"""Running the decoder layers of a model one at a time, outside the model.

The model itself runs only to record how it calls its layers (:func:`capture_layer_calls`); after
that each layer, or a copy of it on another device, turns the hidden states ``[1, T, hidden]`` of
one window of ``T`` tokens into those of the next layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparseserve.errors import NumericalError, UnsupportedModelError
from sparseserve.models.hooks import (
    ForwardStopped,
    as_batch,
    hidden_output,
    hooks,
    run_model,
)
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.structure import ModelStructure, Operator, OperatorGroup


def capture_layer_calls(
    model: nn.Module,
    structure: ModelStructure,
    windows: Sequence[Tensor],
    *,
    autocast_to: torch.dtype | None = None,
) -> tuple[LayerCall, ...]:
    """Record how ``model`` calls its layers: one call for each.

    Two windows are run, which shows what of the other arguments depends on the tokens. The values
    of those are the first window's.

    Args:
        model: The model, in evaluation mode.
        structure: What :func:`~sparseserve.models.structure.trace_structure` found in it.
        windows: Token ids ``[T]`` of one common length.
        autocast_to: What the calls round products to when they are replayed.

    Raises:
        UnsupportedModelError: A layer argument has another form for other tokens, or cannot be
            replayed.
    """
    if not windows or len({window.shape for window in windows}) != 1:
        raise ValueError("windows of one common length are needed, at least one")
    names = [layer.name for layer in structure.layers]
    calls = tuple(call for _, call in _record(model, names, windows[0]))
    # One window alone says nothing about other tokens: its reverse stands in for the second.
    second = windows[1] if len(windows) > 1 else windows[0].flip(-1)
    others = [call for _, call in _record(model, names, second)]
    return tuple(
        replace(call.compared(other), autocast_to=autocast_to)
        for call, other in zip(calls, others, strict=True)
    )


def varying_arguments(
    model: nn.Module,
    structure: ModelStructure,
    calls: Sequence[LayerCall],
    windows: Iterable[Tensor],
) -> Iterator[tuple[list[Tensor], list[list[int]]]]:
    """Yield the tensors in those arguments that depend on the tokens, window by window.

    Args:
        model: The dense model, in evaluation mode.
        structure: Its layers.
        calls: What ``capture_layer_calls`` returned.
        windows: Token ids ``[T]``, as long as those.

    Yields:
        Tensors, each once though several layers may receive it, and for each layer which of them
        its ``varying_tensors`` are.
    """
    names = [layer.name for layer in structure.layers]
    for window in windows:
        tensors: list[Tensor] = []
        places: list[list[int]] = []
        numbers: dict[int, int] = {}
        for call, (_, found) in zip(calls, _record(model, names, window), strict=True):
            own = replace(found, varying=call.varying).varying_tensors()
            for tensor in own:
                if numbers.setdefault(id(tensor), len(tensors)) == len(tensors):
                    tensors.append(tensor)
            places.append([numbers[id(tensor)] for tensor in own])
        yield tensors, places


def entering_states(
    model: nn.Module, structure: ModelStructure, windows: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield the hidden states ``[1, T, hidden]`` that enter the first layer, window by window.

    Raises:
        NumericalError: They are NaN or infinite.
    """
    first = structure.layers[0].name
    for number, window in enumerate(windows):
        states = _record(model, [first], window)[0][0]
        _require_finite(states, f"{first}: the hidden states entering it (window {number})")
        yield states


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Return the hidden states ``[1, T, hidden]`` leaving ``layer``.

    Raises:
        NumericalError: They are NaN or infinite.
    """
    with torch.no_grad():
        output = hidden_output(call.apply(layer, hidden))
    if output is None:
        raise UnsupportedModelError(f"{call.layer} does not return hidden states")
    _require_finite(output, f"{call.layer}: its output")
    return output


def group_input(layer: nn.Module, hidden: Tensor, call: LayerCall, group: OperatorGroup) -> Tensor:
    """Return the input ``[T, in_features]`` that the operators of ``group`` share.

    An expert sees fewer than ``T`` tokens, maybe none.

    The layer stops as soon as the input is known, so the operators of the group do not run.

    Raises:
        NumericalError: The input is NaN or infinite.
    """
    return group_inputs(layer, hidden, call, [group])[0]


def group_inputs(
    layer: nn.Module, hidden: Tensor, call: LayerCall, groups: Sequence[OperatorGroup]
) -> list[Tensor]:
    """Return the input ``[T, in_features]`` of each of ``groups``.

    The layer stops as soon as all are known, so the operators of the last group do not run.

    Raises:
        NumericalError: An input is NaN or infinite.
    """
    found: list[list[Tensor]] = [[] for _ in groups]
    with hooks(_recording(layer, groups, found, stop=True)), torch.no_grad():
        call.apply(layer, hidden)
    return _finite_inputs(found, call, groups, hidden)


def layer_inputs(
    layer: nn.Module, hidden: Tensor, call: LayerCall, groups: Sequence[OperatorGroup]
) -> tuple[list[Tensor], Tensor]:
    """Run ``layer`` once and return the input of each of ``groups`` and its output.

    Returns:
        The inputs ``[T, in_features]`` in the order of ``groups``, and the hidden states
        ``[1, T, hidden]`` leaving the layer.

    Raises:
        NumericalError: An input or the output is NaN or infinite.
    """
    found: list[list[Tensor]] = [[] for _ in groups]
    with hooks(_recording(layer, groups, found, stop=False)):
        output = run_layer(layer, hidden, call)
    return _finite_inputs(found, call, groups, hidden), output


def layer_weight(layer: nn.Module, operator: Operator) -> Tensor:
    """Return the weight ``[out, in]`` of ``operator`` in its stored dtype; the memory is shared."""
    weight = layer.get_submodule(operator.name).get_parameter("weight").detach()
    return weight.T if operator.transposed else weight


def set_layer_weight(layer: nn.Module, operator: Operator, weight: Tensor) -> None:
    """Write ``weight`` ``[out, in]`` into ``operator``, cast to the dtype it is stored in."""
    stored = layer_weight(layer, operator)
    if weight.shape != stored.shape:
        raise ValueError(
            f"{operator.name} takes a weight of {tuple(stored.shape)}, got {tuple(weight.shape)}"
        )
    stored.copy_(weight.detach())


def copy_layer(
    layer: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return an independent copy of ``layer`` on ``device`` with floating tensors as ``dtype``.

    Either left out stays as the layer has it.
    """
    duplicate = copy.deepcopy(layer).to(device=device, dtype=dtype)
    return duplicate.eval().requires_grad_(False)


def _record(
    model: nn.Module, layer_names: Sequence[str], window: Tensor
) -> list[tuple[Tensor, LayerCall]]:
    """Run ``model`` until the last of ``layer_names`` is called and return what each received."""
    recorded: list[tuple[Tensor, LayerCall]] = []

    def hook(name: str) -> RemovableHandle:
        def record(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            hidden, call = LayerCall.from_model(name, args, kwargs)
            # Only the first layer's input is needed; keeping all of them would keep the whole pass.
            recorded.append((hidden.new_empty(0) if recorded else hidden.clone(), call))
            if len(recorded) == len(layer_names):
                raise ForwardStopped

        return model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)

    with hooks([hook(name) for name in layer_names]):
        run_model(model, as_batch(window))
    return recorded


def _recording(
    layer: nn.Module, groups: Sequence[OperatorGroup], found: list[list[Tensor]], *, stop: bool
) -> list[RemovableHandle]:
    """Hook the first operator of each group, so that its inputs end up in ``found``."""

    def hook(group: OperatorGroup, inputs: list[Tensor]) -> RemovableHandle:
        def record(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            assert isinstance(value, Tensor)
            # The copy stays right when the layer later writes into the tensor in place.
            inputs.append(value.detach().reshape(-1, group.in_features).clone())
            if stop and all(found):
                raise ForwardStopped

        operator = layer.get_submodule(group.operators[0].name)
        return operator.register_forward_pre_hook(record, with_kwargs=True)

    return [hook(group, inputs) for group, inputs in zip(groups, found, strict=True)]


def _finite_inputs(
    found: Sequence[list[Tensor]],
    call: LayerCall,
    groups: Sequence[OperatorGroup],
    hidden: Tensor,
) -> list[Tensor]:
    for group, inputs in zip(groups, found, strict=True):
        name = group.operators[0].name
        if not inputs and group.experts is not None:
            inputs.append(hidden.new_empty(0, group.in_features))  # no token was sent there
        if len(inputs) != 1:
            raise ValueError(f"{call.layer}: {name} was called {len(inputs)} times, not once")
        _require_finite(inputs[0], f"{call.layer}: the input of {name}")
    return [inputs[0] for inputs in found]


def _require_finite(tensor: Tensor, what: str) -> None:
    # A finite sum has finite terms; only a sum that is not finite needs a closer look.
    if bool(torch.isfinite(tensor.sum())):
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise NumericalError(
            f"{what} has {int((~finite).sum())} NaN or infinite values of {tensor.numel()}; "
            "try --dtype float32 or bfloat16, or check the checkpoint"
        )
