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

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import NumericalError, RecipeError
from sparseserve.report import HeldOutLoss, RetrainReport
from sparseserve.retraining.checkpointing import (
    autocast_forward,
    checkpointed_layers,
    in_pruning_dtype,
)
from sparseserve.retraining.losses import DensePrediction, Example, prediction_loss
from sparseserve.retraining.settings import Retraining
from sparseserve.retraining.updates import (
    Update,
    installed,
    kept_updates,
    low_rank_updates,
    vector_updates,
)
from sparseserve.text.held_out import held_out_count, spread_places

OnWindow = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class _Examples:
    """Some windows with their predictions, which may lie on disk: each is read when it is used."""

    windows: Sequence[Tensor]
    dense: Sequence[DensePrediction] | None
    numbers: Sequence[int] = ()

    def of(self, numbers: Sequence[int]) -> _Examples:
        return replace(self, numbers=numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        number = self.numbers[index]
        return Example(self.windows[number], self.dense[number] if self.dense is not None else None)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


def retrain(
    model: PreTrainedModel,
    operators: Collection[str],
    windows: Sequence[Tensor],
    knobs: Retraining,
    *,
    dense: Sequence[DensePrediction] = (),
    autocast_to: torch.dtype | None = None,
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
        on_window: Told how many windows were trained on, of how many in all, and the last loss.

    Raises:
        RecipeError: There is only one window, so none can be held out.
        NumericalError: The loss is not finite.
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
            epochs = _train(model, parameters, trained, knobs, measure=measure, on_window=on_window)
        after = _merge(updates, stored_as, before, measure)
    losses = [epoch.loss for epoch in epochs]
    return RetrainReport(
        before=before,
        after=after,
        epochs=epochs,
        kept_epoch=0 if after is before else 1 + losses.index(min(losses)),
        trained_parameters=sum(parameter.numel() for parameter in parameters),
        steps=_steps(trained, knobs),
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
) -> tuple[_Examples, _Examples]:
    """Return the windows to train on and those held out, which are spread evenly over them."""
    if knobs.distillation and len(dense) != len(windows):
        raise ValueError(f"{len(dense)} dense predictions for {len(windows)} windows")
    examples = _Examples(windows, dense if knobs.distillation else None)
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


def _train(
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    examples: _Examples,
    knobs: Retraining,
    *,
    measure: Callable[[], HeldOutLoss],
    on_window: OnWindow,
) -> tuple[HeldOutLoss, ...]:
    """Train ``parameters``, leave them as the best epoch had them; return every epoch's loss."""
    # Updates that start at nothing need no decay towards it over so few steps.
    optimizer = torch.optim.AdamW(parameters, lr=knobs.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(_rate, warmup=knobs.warmup, steps=_steps(examples, knobs))
    )
    generator = torch.Generator().manual_seed(knobs.seed)
    losses: list[HeldOutLoss] = []
    kept: list[Tensor] = []
    for epoch in range(knobs.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        done = epoch * len(examples)
        for start in range(0, len(order), knobs.batch):
            batch = [examples[number] for number in order[start : start + knobs.batch]]
            loss = _backward(model, batch, knobs.distillation)
            done += len(batch)
            on_window(done, knobs.epochs * len(examples), loss)
            nn.utils.clip_grad_norm_(parameters, knobs.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        reached = measure()
        if not losses or reached.loss < min(loss.loss for loss in losses):
            kept = [parameter.detach().clone() for parameter in parameters]
        losses.append(reached)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return tuple(losses)


def _backward(model: PreTrainedModel, batch: Sequence[Example], distillation: float) -> float:
    """Add the gradient of the mean loss of ``batch`` and return that loss."""
    total = 0.0
    for example in batch:
        loss = prediction_loss(model, example, distillation).total / len(batch)
        total += _finite(loss)
        torch.autograd.backward([loss])
    return total


def _steps(examples: _Examples, knobs: Retraining) -> int:
    return knobs.epochs * math.ceil(len(examples) / knobs.batch)


def _rate(step: int, *, warmup: float, steps: int) -> float:
    """Return the share of the learning rate: up in ``warmup * steps`` steps, then down."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / (steps - rising)


@torch.no_grad()
def _held_out_loss(model: PreTrainedModel, examples: _Examples, distillation: float) -> HeldOutLoss:
    losses = [prediction_loss(model, example, distillation) for example in examples]
    return HeldOutLoss(
        loss=sum(_finite(loss.total) for loss in losses) / len(losses),
        cross_entropy=sum(float(loss.cross_entropy) for loss in losses) / len(losses),
    )


def _finite(loss: Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(
            f"retraining: the loss is {value}: lower learning_rate, or check the pruned model"
        )
    return value


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
