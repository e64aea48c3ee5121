"""How much each feature of a layer's output matters to what reads it.

Hidden states run through a normalisation before anything reads them, and its weights are far from
alike: between most layers of Gemma 3 one feature holds nine tenths of the energy, and its weight is
up to 73 times smaller than the median (docs/log.md). An error there is large and harmless. So
errors of hidden states are weighed by the gains with which later layers and the output embedding
read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparseserve.models.hooks import (
    ForwardStopped,
    as_batch,
    hidden_output,
    hooks,
    run_model,
)
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.structure import ModelStructure


def reading_weights(
    model: nn.Module, structure: ModelStructure, window: Tensor
) -> tuple[Tensor, ...]:
    """Return, for each layer, how much a squared error of each feature of its output counts.

    A reader takes in ``n = c * h / rms(h)`` for hidden states ``h``, so an error ``e`` of theirs
    arrives as ``c * e / rms(h)``. For the output of a layer, ``c^2 / rms^2`` is summed over its
    readers: the first operators of every later layer, and the output embedding. The gains ``c``
    are fitted by least squares, which is exact for a normalisation that only scales.

    Args:
        model: A causal language model in evaluation mode.
        structure: Its layers.
        window: Token ids ``[T]``; the model runs on them once.

    Returns:
        float32 ``[hidden]`` for each layer, scaled so that the weights leave the energy of its
        output as it is; all ones where no reader takes in feature by feature.
    """
    watch = _Watch()
    with hooks(list(watch.handles(model, structure))):
        run_model(model, as_batch(window))
    return tuple(
        _weights(watch.states[number:], state.energies)
        for number, state in enumerate(watch.states[1:], start=1)
    )


@dataclass(slots=True)
class _State:
    """Hidden states between two layers, and how the first operators after them read them.

    Attributes:
        energies: Mean squares ``[hidden]`` of the features, for tokens of unit mean square.
        scale: Median of the tokens' mean squares; a few can be thousands of times above the others.
        gains: Squares of ``c``, ``[hidden]``; None until somebody reads.
    """

    energies: Tensor
    scale: float
    gains: Tensor | None = None


def _weights(read: list[_State], energies: Tensor) -> Tensor:
    """Add up the readers of ``read``, the first of which follows the output with ``energies``."""
    gains = [state.gains / state.scale for state in read if state.gains is not None]
    total = torch.stack(gains).sum(dim=0) if gains else torch.zeros_like(energies)
    energy = float((total * energies).mean() / energies.mean())
    return total / energy if energy > 0 else torch.ones_like(energies)


@dataclass(slots=True)
class _Watch:
    """Follows the hidden states: what enters each layer, then what leaves the last one."""

    states: list[_State] = field(default_factory=list)
    _unit: Tensor | None = None

    def handles(self, model: nn.Module, structure: ModelStructure) -> Iterator[RemovableHandle]:
        for layer in structure.layers:
            module = model.get_submodule(layer.name)
            yield module.register_forward_pre_hook(
                lambda _, args, kwargs, name=layer.name: self._between_layers(
                    LayerCall.from_model(name, args, kwargs)[0]
                ),
                with_kwargs=True,
            )
            if layer.groups:
                first = module.get_submodule(layer.groups[0].operators[0].name)
                yield first.register_forward_pre_hook(self._read, with_kwargs=True)
        last = model.get_submodule(structure.layers[-1].name)
        yield last.register_forward_hook(
            lambda _, args, output: self._between_layers(hidden_output(output))
        )
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if head is not None:
            yield head.register_forward_pre_hook(self._read_and_stop, with_kwargs=True)

    def _between_layers(self, hidden: Tensor | None) -> None:
        assert hidden is not None
        tokens = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        squares = tokens.square().mean(dim=-1, keepdim=True).clamp_min(torch.finfo().tiny)
        self._unit = tokens / squares.sqrt()
        self.states.append(_State(self._unit.square().mean(dim=0), float(squares.median())))

    def _read(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(value, Tensor)
        assert self._unit is not None
        state = self.states[-1]
        read = value.detach().reshape(len(self._unit), -1).float()
        if read.shape == self._unit.shape:
            fitted = (read * self._unit).mean(dim=0) / state.energies.clamp_min(torch.finfo().tiny)
            state.gains = fitted.square()

    def _read_and_stop(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._read(module, args, kwargs)
        raise ForwardStopped
