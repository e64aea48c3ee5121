"""Perplexity of a transformers model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sparseserve.errors import NumericalError
from sparseserve.report import PerplexityResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ROWS = 128


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Return exp of the mean negative log-likelihood of ``windows``, int64 ``[length]`` each.

    Every token of a window but its first is predicted from those before it. Windows go through
    the model one at a time; the log-softmax is in float32 whatever the model's dtype, and in
    slices of LOGIT_ROWS positions, so that a large vocabulary needs no second copy of the logits.

    Args:
        model: On any device.
        windows: Token ids, each window at least two tokens long.
        on_window: Told how many windows are done, of how many.

    Raises:
        NumericalError: a window's likelihood is not finite; the message names the window.
    """
    model.eval()
    total, tokens = 0.0, 0
    for index, window in enumerate(windows):
        loss = _negative_log_likelihood(model, window)
        if not math.isfinite(loss):
            raise NumericalError(
                f"window {index}: negative log-likelihood is {loss}: "
                "the model's weights or activations are not finite"
            )
        total += loss
        tokens += len(window) - 1
        on_window(index + 1, len(windows))
    return PerplexityResult.from_negative_log_likelihood(total, tokens)


def _negative_log_likelihood(model: PreTrainedModel, window: Tensor) -> float:
    """Return the summed negative log-likelihood of ``window[1:]``, in nats."""
    ids = window.to(model.device)
    logits, targets = model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:]
    total = 0.0
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        losses = functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        total += float(losses.double().sum())
    return total
