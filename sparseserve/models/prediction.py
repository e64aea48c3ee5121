"""What a model does after its last decoder layer: from hidden states to logits.

No module is known by name. The model itself runs, with its embedding and its decoder layers
replaced by stand-ins that do nothing; the last of them hands out the hidden states in question.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparseserve.models.hooks import hidden_output, hooks
from sparseserve.models.structure import ModelStructure

# The largest relative difference of logits that 16-bit arithmetic explains.
_ROUNDING = 0.05

logger = logging.getLogger(__name__)


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

    def to(self, device: torch.device) -> PredictionHead:
        """Move the head to ``device`` and return it."""
        self._model.to(device=device)
        return self


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
        None if the logits are not a function of these hidden states alone, or if the model does
        not run with stand-ins for its layers.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return _tried(model, [layer.name for layer in structure.layers], window, device)
    except Exception:  # whatever the model's own code raises when its layers are not there
        logger.info("the last layer is trained towards its dense output", exc_info=True)
        return None


def _tried(
    model: PreTrainedModel, names: Sequence[str], window: Tensor, device: torch.device
) -> PredictionHead | None:
    """Return the head if it predicts what ``model`` does in ``window``."""
    outputs, expected = _run(model, names, window)
    with _stand_ins(model, outputs):
        shared = {
            id(tensor): tensor
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.device == device and tensor.dtype == torch.float32
        }
        duplicate = copy.deepcopy(model, shared).to(device=device, dtype=torch.float32)
    last = duplicate.get_submodule(names[-1])
    assert isinstance(last, _SkippedLayer)
    head = PredictionHead(duplicate.eval().requires_grad_(False), last)
    hidden = hidden_output(outputs[names[-1]])
    assert hidden is not None
    with torch.no_grad():
        found = head(hidden.to(device, torch.float32)).to(expected)
    difference = (found - expected).float().norm() / expected.float().norm()
    return head if float(difference) < _ROUNDING else None


def _run(
    model: PreTrainedModel, layers: Sequence[str], window: Tensor
) -> tuple[dict[str, object], Tensor]:
    """Run ``model`` on ``window``; return what each of ``layers`` returned, and the logits."""
    outputs: dict[str, object] = {}

    def watch(name: str) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            outputs[name] = output

        module: nn.Module = model.get_submodule(name)
        return module.register_forward_hook(keep)

    with hooks([watch(name) for name in layers]), torch.no_grad():
        logits = model(window[None].to(model.device), use_cache=False).logits
    return outputs, logits


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

    def __getstate__(self) -> dict[str, object]:
        # A head that goes to another machine takes no weights of the layers along.
        return {**self.__dict__, "original": _without_weights(self.original)}


def _without_weights(module: nn.Module) -> nn.Module:
    """Copy ``module`` with tensors of the same shapes and devices that hold one number each."""
    tensors = (*module.parameters(), *module.buffers())
    empty = {id(tensor): tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors}
    return copy.deepcopy(module, empty)


class _SkippedLayer(_StandIn):
    """Returns the hidden states that enter it, or other ones that are given to it.

    They stand where the layer had them: alone, or before as many None as it returned other things.
    """

    leaving: Tensor | None = None

    def __init__(self, original: nn.Module, others: int | None) -> None:
        super().__init__(original)
        self._others = others

    def __deepcopy__(self, memo: dict[int, object]) -> _SkippedLayer:
        return type(self)(self.original, self._others)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        hidden = self.leaving
        if hidden is None:
            hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._others is None else (hidden, *[None] * self._others)


def _others(returned: object) -> int | None:
    """Return how many things a layer returned after the hidden states; None for these alone."""
    return len(returned) - 1 if isinstance(returned, tuple | list) else None


class _NoEmbedding(_StandIn):
    """Returns zeros: the hidden states between the layers do not matter."""

    def forward(self, tokens: Tensor) -> Tensor:
        width = self.original.weight.shape[1]
        return torch.zeros(*tokens.shape, width, device=tokens.device)


@contextmanager
def _stand_ins(model: PreTrainedModel, outputs: Mapping[str, object]) -> Iterator[None]:
    """Replace the embedding of ``model`` and the layers that gave ``outputs`` in the block."""
    embedding = model.get_input_embeddings()
    originals = {name: model.get_submodule(name) for name in outputs}
    try:
        model.set_input_embeddings(_NoEmbedding(embedding))
        for name, layer in originals.items():
            model.set_submodule(name, _SkippedLayer(layer, _others(outputs[name])))
        yield
    finally:
        model.set_input_embeddings(embedding)
        for name, layer in originals.items():
            model.set_submodule(name, layer)
