"""Hand-made models that are a chain of layers, and what tracing says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.structure import ModelStructure, trace_structure
from sparseserve.testing import TINY_VOCABULARY

TOKENS = torch.arange(12)
WIDTH = 16


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
