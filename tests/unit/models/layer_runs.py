"""Runs of whole models, to compare with runs of one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, entering_states
from sparseserve.models.structure import ModelStructure
from sparseserve.testing import TINY_VOCABULARY

LENGTH = 24  # three times the local attention window of the tiny models
WIDTH = 16
CPU = torch.device("cpu")


def windows(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (LENGTH,), generator=generator) for _ in range(count)]


def modules_of(model: nn.Module, structure: ModelStructure) -> list[nn.Module]:
    return [model.get_submodule(layer.name) for layer in structure.layers]


def seen_in_the_model(
    model: nn.Module, names: Sequence[str], window: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs and outputs of the named modules in one undisturbed run of the whole model."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = (args[0].clone(), first.clone())

        return model.get_submodule(name).register_forward_hook(record)

    handles = [watch(name) for name in names]
    with torch.no_grad():
        model(window[None])
    for handle in handles:
        handle.remove()
    return seen


class Scaled(nn.Module):
    """A layer of one linear operator that multiplies by an argument of the model's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, scale: object) -> Tensor:
        factor = scale if isinstance(scale, (Tensor, float)) else 1.0
        output: Tensor = hidden + self.linear(hidden) * factor
        return output


class ScaledChain(nn.Module):
    """Two layers that receive whatever :meth:`scale` says."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TINY_VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Scaled(), Scaled()])
        self.eval().requires_grad_(False)

    def scale(self, tokens: Tensor) -> object:
        return torch.ones(tokens.shape[1], 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden, scale=self.scale(tokens))
        output: Tensor = hidden
        return output


@dataclass(frozen=True)
class Captured:
    """How the layers are called, and what enters the first of them for each window."""

    calls: tuple[LayerCall, ...]
    hidden: list[Tensor]


def capture(model: nn.Module, structure: ModelStructure, texts: Sequence[Tensor]) -> Captured:
    return Captured(
        capture_layer_calls(model, structure, texts),
        list(entering_states(model, structure, texts)),
    )
