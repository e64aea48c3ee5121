r"""Reconstruction of a whole decoder layer against its dense outputs, the masks fixed.

    minimise over the kept weights, biases and norms   mean ||s (f(h*) - f0(h))||^2 / ||f0(h)||^2

``f0`` is the dense layer on what enters it in the dense model, ``f`` the pruned one on what enters
it in the pruned model, and the mean is over tokens. ``s`` weighs features by the gains with which
later layers read them (``models/reading.py``). Only the predictions follow the last layer, so what
is minimised there is their divergence from the dense model's, KL(dense || pruned).

Operator-wise pruning cannot see that attention and activation functions let some errors through
and damp others; the gradient through the layer does. Each token's error is taken relative to its
hidden state, since the norm that the next layer begins with does so; a plain sum would be that of
the few tokens whose hidden states are a hundred times larger (Sun et al. 2024, "Massive activations
in large language models"). Adam with a cosine schedule; windows held out decide which epoch is
kept, or none, and whether its rate is too high.

Shen et al. 2025, "Wanda++" (regional optimisation); Makni et al. 2025, "3BASiL" (transformer
matching); Wagner et al. 2025, "A free lunch in LLM compression".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.errors import NumericalError, RecipeError
from sparseserve.huggingface.experts import routers_in
from sparseserve.layerwise.layer_calls import LayerCalls
from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.hooks import hidden_output
from sparseserve.models.layer_list import linear_modules
from sparseserve.models.layers import copy_layer
from sparseserve.models.prediction import PredictionHead
from sparseserve.recipe.steps import Reconstruction
from sparseserve.report import ReconstructionReport
from sparseserve.retraining.losses import mean_divergence
from sparseserve.text.held_out import held_out_count

# Tokens of a window that the last layer's predictions are compared at: more would cost logits.
_PREDICTED = 128


@dataclass(frozen=True, slots=True)
class RelativeError:
    """``mean ||s (f - f0)||^2 / ||f0||^2``; ``weights`` is ``s^2``, ``[hidden]``, None for 1."""

    weights: Tensor | None

    def of(self, output: Tensor, target: Tensor, turn: int) -> Tensor:
        """Return the error of ``output``, a scalar; both are ``[1, tokens, hidden]``."""
        energy = target.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        error = (output - target).square()
        if self.weights is not None:
            error = error * self.weights
        return (error.sum(dim=-1) / energy).mean()

    def to(self, device: torch.device) -> RelativeError:
        """Return the same on ``device``."""
        return RelativeError(None if self.weights is None else self.weights.to(device))


@dataclass(frozen=True, slots=True)
class PredictionError:
    """``KL(dense || pruned)`` of what ``predict`` turns a layer's output into, in nats a token."""

    predict: Callable[[Tensor], Tensor]

    def of(self, output: Tensor, target: Tensor, turn: int) -> Tensor:
        """Return the divergence, a scalar, at some tokens: others each ``turn``."""
        stride = -(-target.shape[1] // _PREDICTED)
        chosen = slice(turn % stride, None, stride)
        with torch.no_grad():
            expected = self.predict(target[:, chosen]).log_softmax(dim=-1)
        found = self.predict(output[:, chosen]).log_softmax(dim=-1)
        return mean_divergence(expected, found)

    def to(self, device: torch.device) -> PredictionError:
        """Return the same on ``device``; a head of a model is moved there itself."""
        predict = self.predict
        return PredictionError(
            predict.to(device) if isinstance(predict, PredictionHead) else predict
        )


OutputError = RelativeError | PredictionError


def reconstruct(
    context: LayerContext,
    pruned: nn.Module,
    masked: Sequence[str],
    knobs: Reconstruction,
    output_error: OutputError,
) -> tuple[nn.Module, ReconstructionReport]:
    """Train the pruned layer towards the dense one; return it, or what it was if that is worse.

    Args:
        context: The dense layer, what enters the two and what leaves the dense one.
        pruned: The pruned layer; left untouched.
        masked: Names in the layer of the weights that were pruned. Their zeros stay zero; the
            other matrices and all routers stay as they are, biases and norms are trained.
        knobs: How; at least one epoch.
        output_error: What to lower.

    Returns:
        The layer in float32, and what training did to the root of the objective.

    Raises:
        RecipeError: There are fewer than two windows, so none can be held out.
        NumericalError: The error of the pruned layer is not finite.
    """
    student = copy_layer(pruned, dtype=torch.float32)
    trained = _Trained.of(student, masked)
    windows = _Windows.of(context, knobs, output_error)
    start = lowest = windows.held_out_error(student)
    if not math.isfinite(start):
        raise NumericalError(
            f"{context.layer.name}: its output error is {start} before reconstruction"
        )
    best, best_epoch = trained.snapshot(), 0
    rate = knobs.learning_rate
    training = _Training(student, trained, windows, rate, knobs.epochs)
    for epoch in range(1, knobs.epochs + 1):
        with _tensor_cores():
            training.run_epoch(epoch)
        error = windows.held_out_error(student)
        if error < lowest:
            lowest, best, best_epoch = error, trained.snapshot(), epoch
        elif best_epoch == 0 and epoch < knobs.epochs:
            rate /= 3
            trained.restore(best)
            training = _Training(student, trained, windows, rate, knobs.epochs - epoch)
    trained.restore(best)
    return student.requires_grad_(False), ReconstructionReport(best_epoch, rate, start, lowest)


def windows_held_out(text: int, knobs: Reconstruction) -> int:
    """Return how many of ``text`` calibration windows are not trained on.

    Raises:
        RecipeError: None would be left to train on.
    """
    held_out = held_out_count(knobs.held_out, text)
    if held_out >= text:
        raise RecipeError(
            f"reconstruction holds {held_out} of {text} calibration windows out, which leaves "
            "none to train on: raise --samples"
        )
    return held_out


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 on its tensor cores (TF32): ten bits are enough for a gradient."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Training:
    """Adam with a cosine schedule over ``epochs`` epochs."""

    def __init__(
        self, student: nn.Module, trained: _Trained, windows: _Windows, rate: float, epochs: int
    ) -> None:
        self._student, self._trained, self._windows = student, trained, windows
        self._optimizer = torch.optim.Adam(trained.groups(rate), betas=(0.9, 0.95), fused=True)
        steps = epochs * len(windows.batches(0))
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)

    def run_epoch(self, epoch: int) -> None:
        """Take a step for each batch of windows, in the order of that epoch."""
        for batch in self._windows.batches(epoch):
            self._optimizer.zero_grad()
            for index in batch.tolist():
                error = self._windows.error(self._student, index, epoch) / len(batch)
                error.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._schedule.step()
            self._trained.apply_masks()


@dataclass(frozen=True, slots=True)
class _Trained:
    """The parameters that are trained, and where the pruned ones may differ from zero."""

    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]

    @classmethod
    def of(cls, student: nn.Module, masked: Sequence[str]) -> _Trained:
        matrices = {f"{name}.weight" for name, _ in linear_modules(student)} - set(masked)
        # Trained routers would send the tokens elsewhere than the pruned experts were made for.
        routers = routers_in(student)
        parameters = {
            name: parameter.requires_grad_()
            for name, parameter in student.named_parameters()
            if name not in matrices and name.rpartition(".")[0] not in routers
        }
        return cls(parameters, {name: parameters[name].detach() != 0 for name in masked})

    def groups(self, learning_rate: float) -> list[dict[str, object]]:
        """Return Adam's parameter groups: its steps have one size, weights have many."""
        return [
            {"params": [parameter], "lr": learning_rate * _scale(parameter)}
            for parameter in self.parameters.values()
        ]

    @torch.no_grad()
    def apply_masks(self) -> None:
        for name, mask in self.masks.items():
            self.parameters[name].mul_(mask)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)


@dataclass(frozen=True, slots=True)
class _Windows:
    """What enters the pruned layer and what should leave it; the last windows are held out.

    Those are windows of text; scrambled ones are only trained on.
    """

    entering: HiddenStates
    leaving: HiddenStates
    calls: LayerCalls
    output_error: OutputError
    device: torch.device
    training: int
    batch: int

    @classmethod
    def of(
        cls, context: LayerContext, knobs: Reconstruction, output_error: OutputError
    ) -> _Windows:
        count = len(context.entering)
        held_out = windows_held_out(count - context.scrambled, knobs)
        return cls(
            entering=context.entering,
            leaving=context.required_dense.leaving,
            calls=context.calls.to(context.device, torch.float32),
            output_error=output_error,
            device=context.device,
            training=count - held_out,
            batch=knobs.batch,
        )

    def batches(self, epoch: int) -> tuple[Tensor, ...]:
        """Return the training windows in batches, in an order of their own for each epoch."""
        generator = torch.Generator().manual_seed(epoch)
        return torch.split(torch.randperm(self.training, generator=generator), self.batch)

    def error(self, student: nn.Module, index: int, epoch: int = 0) -> Tensor:
        """Return the objective of one window, on other tokens in each epoch where it predicts."""
        target = self.leaving[index].to(self.device, torch.float32)
        entering = self.entering[index].to(self.device, torch.float32)
        output = hidden_output(self.calls[index].apply(student, entering))
        assert output is not None
        return self.output_error.of(output, target, index + epoch)

    @torch.no_grad()
    def held_out_error(self, student: nn.Module) -> float:
        """Return the root of the mean over the windows held out."""
        held_out = range(self.training, len(self.entering))
        return math.sqrt(math.fsum(float(self.error(student, i)) for i in held_out) / len(held_out))


def _scale(parameter: Tensor) -> float:
    """Return the root mean square of a tensor without its zeros; 1 where nothing else is left."""
    kept = parameter.detach()
    kept = kept[kept != 0]
    return float(kept.square().mean().sqrt()) if len(kept) else 1.0
