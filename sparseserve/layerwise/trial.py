"""Trying what a run will do with the decoder layers, on a few tokens and without pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import UnsupportedModelError, first_line
from sparseserve.layerwise.reconstruction import windows_held_out
from sparseserve.models.hooks import hidden_output
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states, run_layer
from sparseserve.models.prediction import prediction_head
from sparseserve.models.reading import reading_weights
from sparseserve.models.structure import ModelStructure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.retraining.checkpointing import autocast_forward, checkpointed_layers
from sparseserve.retraining.retrain import check_retraining
from sparseserve.retraining.updates import vector_updates
from sparseserve.text.calibration import CalibrationSet

#: Tokens that a model is tried on: structure depends on no token, and more would cost time.
TRIED_TOKENS = 8
_CPU = torch.device("cpu")


def try_layers(
    model: PreTrainedModel,
    structure: ModelStructure,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    autocast_to: torch.dtype | None,
) -> None:
    """Run one layer of each kind alone, and backwards what ``recipe`` will train.

    Args:
        model: A causal language model on the CPU; not changed.
        structure: Its layers.
        recipe: Says what is trained: layers, the last one through the head, the whole model.
        calibration: Its windows are cut to a few tokens.
        autocast_to: What the run will round products inside layers to.

    Raises:
        UnsupportedModelError: A layer cannot be called alone, or has no gradient; names it.
        RecipeError: There are too few windows to hold some out, or nothing to train.
        NumericalError: A layer's output is not finite.
    """
    windows = [window[:TRIED_TOKENS] for window in calibration.windows[:2]]
    calls = capture_layer_calls(model, structure, windows, autocast_to=autocast_to)
    [hidden] = entering_states(model, structure, windows[:1])
    trained = recipe.reconstruction.epochs > 0
    head: Callable[[Tensor], Tensor] | None = None
    if trained:
        windows_held_out(len(calibration.windows), recipe.reconstruction)
        reading_weights(model, structure, windows[0])
        head = prediction_head(model, structure, windows[0], _CPU)
    for index in _one_of_each_kind(model, structure):
        name = structure.layers[index].name
        call = calls[index].to(_CPU, torch.float32)
        layer = copy_layer(model.get_submodule(name), _CPU, torch.float32)
        run_layer(layer, hidden.float(), call)
        if trained:
            last = index == len(calls) - 1
            _run_backwards(layer, hidden.float(), call, head if last else None)
    if recipe.retraining.epochs:
        check_retraining(model, calibration.for_retraining, recipe.retraining)
        _retrain_nothing(model, windows[0], recipe, autocast_to)


def _one_of_each_kind(model: nn.Module, structure: ModelStructure) -> list[int]:
    """Return the places of the first layer of each class and set of operators, and of the last."""
    kinds: dict[object, int] = {}
    for index, layer in enumerate(structure.layers):
        kinds.setdefault((type(model.get_submodule(layer.name)), layer.groups), index)
    return sorted({*kinds.values(), len(structure.layers) - 1})


def _run_backwards(
    layer: nn.Module, hidden: Tensor, call: LayerCall, head: Callable[[Tensor], Tensor] | None
) -> None:
    layer.requires_grad_(True)
    with _gradients(call.layer, "--reconstruct 0 leaves layers as they are pruned"):
        output = hidden_output(call.apply(layer, hidden))
        assert output is not None, "run_layer has refused that"
        predicted = output if head is None else head(output).log_softmax(dim=-1)
        torch.autograd.backward([predicted.square().mean()])


def _retrain_nothing(
    model: PreTrainedModel, window: Tensor, recipe: PruneRecipe, autocast_to: torch.dtype | None
) -> None:
    """Run the model backwards, to its norms and biases or else its first layer's weights."""
    knobs = recipe.retraining
    found = [update.parameter for update in vector_updates(model, norms=True, biases=True)]
    parameters = found or list(model.parameters())[:1]
    rounded = autocast_forward(model, autocast_to)
    recomputed = checkpointed_layers(model, window) if knobs.checkpointing else nullcontext()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with _gradients("the model", "--retrain 0 leaves it as it is pruned"), rounded, recomputed:
            logits = model(window[None], use_cache=False).logits
            torch.autograd.backward([logits.float().log_softmax(dim=-1).mean()])
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def _gradients(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{what}: cannot be trained ({first_line(error)}): {remedy}"
        ) from error
