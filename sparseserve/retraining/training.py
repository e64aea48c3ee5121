"""The steps of training: AdamW with a warm-up, each epoch judged on text that was held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import NumericalError
from sparseserve.report import HeldOutLoss
from sparseserve.retraining.losses import DensePrediction, Example, prediction_loss
from sparseserve.retraining.settings import Retraining
from sparseserve.retraining.state import StateFolder, TrainingState

OnWindow = Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Examples:
    """Some windows with their predictions, which may lie on disk: each is read when it is used."""

    windows: Sequence[Tensor]
    dense: Sequence[DensePrediction] | None
    numbers: Sequence[int] = ()

    def of(self, numbers: Sequence[int]) -> Examples:
        """Return those of these windows."""
        return replace(self, numbers=numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        """Read one."""
        number = self.numbers[index]
        return Example(self.windows[number], self.dense[number] if self.dense is not None else None)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Training:
    """Trains ``parameters`` of a model; begins where ``store`` says that an earlier run ended."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Sequence[nn.Parameter],
        examples: Examples,
        knobs: Retraining,
        store: StateFolder | None,
    ) -> None:
        """Put the parameters where the stored state has them.

        Args:
            model: Takes the parameters along when it runs.
            parameters: In float32.
            examples: To train on.
            knobs: How.
            store: Keeps the state; None keeps none.
        """
        self._model, self._parameters, self._examples = model, parameters, examples
        self._knobs, self._store = knobs, store
        # Updates that start at nothing need no decay towards it over so few steps.
        self._optimizer = torch.optim.AdamW(parameters, lr=knobs.learning_rate, weight_decay=0.0)
        self._losses: list[HeldOutLoss] = []
        self._kept: list[Tensor] = []
        self._taken = 0
        state = store.load() if store else None
        if state is not None:
            self._restore(state)
        self._saved = time.monotonic()

    @property
    def steps(self) -> int:
        """Steps of all epochs together."""
        return self._knobs.epochs * self._steps_an_epoch

    def run(
        self, measure: Callable[[], HeldOutLoss], on_window: OnWindow
    ) -> tuple[HeldOutLoss, ...]:
        """Train; leave the parameters as the best epoch had them; return every epoch's loss.

        Raises:
            NumericalError: The loss is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        generator = torch.Generator().manual_seed(self._knobs.seed)
        for epoch in range(self._knobs.epochs):
            order = torch.randperm(len(self._examples), generator=generator).tolist()
            self._run_epoch(epoch, order, on_window)
            if epoch < len(self._losses):
                continue  # judged before this run began
            reached = measure()
            if not self._losses or reached.loss < min(loss.loss for loss in self._losses):
                self._kept = [parameter.detach().clone() for parameter in self._parameters]
            self._losses.append(reached)
        _set(self._parameters, self._kept)
        return tuple(self._losses)

    @property
    def _steps_an_epoch(self) -> int:
        return math.ceil(len(self._examples) / self._knobs.batch)

    def _run_epoch(self, epoch: int, order: Sequence[int], on_window: OnWindow) -> None:
        total = self._knobs.epochs * len(order)
        for step in range(self._steps_an_epoch):
            if epoch * self._steps_an_epoch + step < self._taken:
                continue
            numbers = order[step * self._knobs.batch : (step + 1) * self._knobs.batch]
            loss = self._step([self._examples[number] for number in numbers])
            done = epoch * len(order) + step * self._knobs.batch + len(numbers)
            on_window(done, total, loss)
            if self._store and time.monotonic() - self._saved >= self._store.every_seconds:
                self._store.save(self._state())
                self._saved = time.monotonic()

    def _step(self, batch: Sequence[Example]) -> float:
        """Take a step on ``batch`` and return its mean loss."""
        rate = self._knobs.learning_rate * _share(self._taken, self._knobs.warmup, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = _backward(self._model, batch, self._knobs.distillation)
        nn.utils.clip_grad_norm_(self._parameters, self._knobs.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._taken += 1
        return loss

    def _state(self) -> TrainingState:
        # AdamW keeps nothing of a parameter that no gradient has reached yet.
        found = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        return TrainingState(
            steps=self._taken,
            losses=tuple(self._losses),
            parameters=self._parameters,
            moments=[
                (each["exp_avg"], each["exp_avg_sq"])
                if each
                else (torch.zeros_like(parameter), torch.zeros_like(parameter))
                for parameter, each in zip(self._parameters, found, strict=True)
            ],
            taken=[int(each.get("step", 0)) for each in found],
            kept=self._kept,
        )

    def _restore(self, state: TrainingState) -> None:
        _set(self._parameters, state.parameters)
        moved = zip(self._parameters, state.moments, state.taken, strict=True)
        for parameter, (first, second), taken in moved:
            if not taken:
                continue
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(taken)),
                "exp_avg": first.to(parameter.device),
                "exp_avg_sq": second.to(parameter.device),
            }
        self._losses, self._taken = list(state.losses), state.steps
        self._kept = [value.to(self._parameters[0].device) for value in state.kept]


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _backward(model: PreTrainedModel, batch: Sequence[Example], distillation: float) -> float:
    """Add the gradient of the mean loss of ``batch`` and return that loss."""
    total = 0.0
    for example in batch:
        loss = prediction_loss(model, example, distillation).total / len(batch)
        total += finite(loss)
        torch.autograd.backward([loss])
    return total


def _share(step: int, warmup: float, steps: int) -> float:
    """Return the share of the learning rate: up in ``warmup * steps`` steps, then down."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / (steps - rising)


def finite(loss: Tensor) -> float:
    """Return a loss as a number.

    Raises:
        NumericalError: It is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(
            f"retraining: the loss is {value}: lower learning_rate, or check the pruned model"
        )
    return value
