"""Retraining a pruned model on its calibration text, without undoing the pruning.

Layer by layer, pruning sees the errors of one decoder layer at a time. Here the loss is that of the
model's predictions, and its gradient reaches all layers.

PERP (Zimmer et al. 2023, "PERP: Rethinking the prune-retrain paradigm in the era of LLMs"): after
pruning, train only norms, biases and low-rank updates of the pruned operators under their masks
(MaskLoRA), then merge them, so the checkpoint keeps its format and its zeros. PERP minimises the
cross-entropy of the next token; here the loss can also, or instead, be the divergence from the
predictions of the dense model (distillation), and all kept weights can be trained.

Some windows are held out of training: the epoch that does best on them is kept, or nothing if none
does better than the pruned model. Windows that the pruner was calibrated with flatter the pruned
model, so there this decision is on the cautious side; fresh windows flatter neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import RecipeError
from sparseserve.report import HeldOutLoss, RetrainReport
from sparseserve.retraining.checkpointing import (
    autocast_forward,
    checkpointed_layers,
    in_pruning_dtype,
)
from sparseserve.retraining.losses import DensePrediction, prediction_loss
from sparseserve.retraining.settings import Retraining
from sparseserve.retraining.state import StateFolder
from sparseserve.retraining.training import Examples, OnWindow, Training, finite
from sparseserve.retraining.updates import (
    Update,
    installed,
    kept_updates,
    low_rank_updates,
    vector_updates,
)
from sparseserve.text.held_out import held_out_count, spread_places


def retrain(
    model: PreTrainedModel,
    operators: Collection[str],
    windows: Sequence[Tensor],
    knobs: Retraining,
    *,
    dense: Sequence[DensePrediction] = (),
    autocast_to: torch.dtype | None = None,
    store: StateFolder | None = None,
    on_window: OnWindow = lambda done, total, loss: None,
) -> RetrainReport:
    """Retrain ``model`` in place where it lies; what is zero in ``operators`` stays zero.

    Embeddings and the language head stay as they are. The held-out loss never rises. Two runs on
    one machine with equal knobs end with equal bytes.

    Args:
        model: A pruned causal language model in evaluation mode, without gradients. On the CPU it
            computes in float32 whatever its dtype, but for ``autocast_to``.
        operators: Full names of the pruned linears.
        windows: Token ids ``[T]``, at least two windows.
        knobs: How; at least one epoch.
        dense: The dense model's predictions in these windows; needed for distillation.
        autocast_to: What products are rounded to; None leaves them alone.
        store: Keeps the state of training now and then, for a run that is killed; what it holds at
            the start must be of the same model, windows and knobs.
        on_window: Told how many windows were trained on, of how many in all, and the last loss.

    Raises:
        RecipeError: There is only one window, so none can be held out.
        NumericalError: The loss is not finite.
        ArtifactError: The disk is full or cannot be written.
    """
    started = time.perf_counter()
    check_retraining(model, windows, knobs)
    trained, held_out = _split(windows, dense, knobs)
    updates = _updates(model, operators, knobs)
    parameters = [parameter for update in updates for parameter in update.change.parameters()]
    with ExitStack() as stack:
        stored_as = stack.enter_context(in_pruning_dtype(model))
        stack.enter_context(autocast_forward(model, autocast_to))
        if knobs.checkpointing:
            stack.enter_context(checkpointed_layers(model, windows[0]))
        measure = partial(_held_out_loss, model, held_out, knobs.distillation)
        before = measure()
        with installed(updates):
            training = Training(model, parameters, trained, knobs, store)
            epochs = training.run(measure, on_window)
        after = _merge(updates, stored_as, before, measure)
    losses = [epoch.loss for epoch in epochs]
    return RetrainReport(
        before=before,
        after=after,
        epochs=epochs,
        kept_epoch=0 if after is before else 1 + losses.index(min(losses)),
        trained_parameters=sum(parameter.numel() for parameter in parameters),
        steps=training.steps,
        seconds=time.perf_counter() - started,
    )


def check_retraining(model: nn.Module, windows: Sequence[Tensor], knobs: Retraining) -> None:
    """Refuse what cannot be retrained.

    Raises:
        RecipeError: There is only one window, so none can be held out, or nothing to train.
    """
    if len(windows) < 2:
        raise RecipeError("retraining holds windows out, so it needs at least --samples 2")
    vectors = vector_updates(model, norms=knobs.norms, biases=knobs.biases)
    if not (knobs.every_weight or knobs.rank or vectors):
        raise RecipeError("retraining: the model has no norms or biases to train: set rank")


def _split(
    windows: Sequence[Tensor], dense: Sequence[DensePrediction], knobs: Retraining
) -> tuple[Examples, Examples]:
    """Return the windows to train on and those held out, which are spread evenly over them."""
    if knobs.distillation and len(dense) != len(windows):
        raise ValueError(f"{len(dense)} dense predictions for {len(windows)} windows")
    examples = Examples(windows, dense if knobs.distillation else None)
    count = min(held_out_count(knobs.held_out, len(windows)), len(windows) - 1)
    chosen = spread_places(count, len(windows))
    trained = [number for number in range(len(windows)) if number not in chosen]
    return examples.of(trained), examples.of(chosen)


def _updates(model: nn.Module, operators: Collection[str], knobs: Retraining) -> list[Update]:
    updates = vector_updates(model, norms=knobs.norms, biases=knobs.biases)
    if knobs.every_weight:
        updates += kept_updates(model, operators)
    elif knobs.rank:
        updates += low_rank_updates(
            model, operators, rank=knobs.rank, scale=knobs.scale, seed=knobs.seed
        )
    return updates


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, examples: Examples, distillation: float) -> HeldOutLoss:
    losses = [prediction_loss(model, example, distillation) for example in examples]
    return HeldOutLoss(
        loss=sum(finite(loss.total) for loss in losses) / len(losses),
        cross_entropy=sum(float(loss.cross_entropy) for loss in losses) / len(losses),
    )


@torch.no_grad()
def _merge(
    updates: Sequence[Update],
    stored_as: Mapping[nn.Parameter, torch.dtype],
    before: HeldOutLoss,
    measure: Callable[[], HeldOutLoss],
) -> HeldOutLoss:
    """Add ``updates`` to the weights, or nothing if that is no better than ``before``.

    The weights are rounded to the dtype they are stored in before they are judged.
    """
    originals = [update.parameter.data for update in updates]
    for update in updates:
        parameter = update.parameter
        parameter.data = update.merged().to(stored_as[parameter]).to(parameter.dtype)
    after = measure()
    if after.loss < before.loss:
        return after
    for update, original in zip(updates, originals, strict=True):
        update.parameter.data = original
    return before
