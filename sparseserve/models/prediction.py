"""What a model does after its last decoder layer: from hidden states to logits.

No module is known by name. The model itself runs, with its embedding and its decoder layers
replaced by stand-ins that do nothing; the last of them hands out the hidden states in question.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.models.hooks import hidden_output, hooks
from sparseserve.models.structure import ModelStructure

# The largest relative difference of logits that 16-bit arithmetic explains.
_ROUNDING = 0.05


class PredictionHead:
    """Turns hidden states ``[1, T, hidden]`` leaving the last layer into logits ``[1, T, V]``."""

    def __init__(self, model: PreTrainedModel, last: _SkippedLayer) -> None:
        """Take a ``model`` of stand-ins, and the ``last`` layer among them."""
        self._model = model
        self._last = last

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits; gradients flow back to ``hidden``."""
        self._last.leaving = hidden
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        logits = self._model(tokens, use_cache=False).logits
        self._last.leaving = None
        assert isinstance(logits, Tensor)
        return logits


def prediction_head(
    model: nn.Module, structure: ModelStructure, window: Tensor, device: torch.device
) -> PredictionHead | None:
    """Copy what ``model`` does after its layers, in float32, to ``device``.

    What is there in float32 already is shared, not copied.

    Args:
        model: A causal language model in evaluation mode.
        structure: Its layers.
        window: Token ids ``[T]`` to try the copy on; a dozen are enough.
        device: Where to predict.

    Returns:
        None if the logits are not a function of these hidden states alone.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    names = [layer.name for layer in structure.layers]
    output, expected = _run(model, names[-1], window)
    with _stand_ins(model, names):
        shared = {
            id(tensor): tensor
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.device == device and tensor.dtype == torch.float32
        }
        duplicate = copy.deepcopy(model, shared).to(device=device, dtype=torch.float32)
    last = duplicate.get_submodule(names[-1])
    assert isinstance(last, _SkippedLayer)
    last.as_tuple = isinstance(output, tuple)
    head = PredictionHead(duplicate.eval().requires_grad_(False), last)
    hidden = hidden_output(output)
    assert hidden is not None
    with torch.no_grad():
        found = head(hidden.to(device, torch.float32)).to(expected)
    difference = (found - expected).float().norm() / expected.float().norm()
    return head if float(difference) < _ROUNDING else None


def _run(model: PreTrainedModel, layer: str, window: Tensor) -> tuple[object, Tensor]:
    """Run ``model`` on ``window``; return what ``layer`` returned, and the logits."""
    outputs: list[object] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with hooks([handle]), torch.no_grad():
        logits = model(window[None].to(model.device), use_cache=False).logits
    return outputs[0], logits


class _StandIn(nn.Module):
    """Takes the place of a module and does not run it; its attributes can still be asked for."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: its weights are neither copied nor moved with the model.
        object.__setattr__(self, "original", original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, object]) -> _StandIn:
        return type(self)(self.original)


class _SkippedLayer(_StandIn):
    """Returns the hidden states that enter it, or other ones that are given to it."""

    leaving: Tensor | None = None
    as_tuple: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> object:
        hidden = self.leaving
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if self.as_tuple else hidden


class _NoEmbedding(_StandIn):
    """Returns zeros: the hidden states between the layers do not matter."""

    def forward(self, tokens: Tensor) -> Tensor:
        width = self.original.weight.shape[1]
        return torch.zeros(*tokens.shape, width, device=tokens.device)


@contextmanager
def _stand_ins(model: PreTrainedModel, layers: Sequence[str]) -> Iterator[None]:
    """Replace the layers and the embedding of ``model`` while the block runs."""
    embedding = model.get_input_embeddings()
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        model.set_input_embeddings(_NoEmbedding(embedding))
        for name, layer in originals.items():
            model.set_submodule(name, _SkippedLayer(layer))
        yield
    finally:
        model.set_input_embeddings(embedding)
        for name, layer in originals.items():
            model.set_submodule(name, layer)
