"""Perplexity as vLLM computes it, to set beside that of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.report import PerplexityResult
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options


class ScoringEngine(Protocol):
    """What tells how likely it finds a text."""

    def negative_log_likelihoods(self, windows: Sequence[Tensor]) -> list[float]:
        """Return that of each of ``windows``, summed over all tokens but the first, in nats."""


def vllm_perplexity(
    folder: Path,
    windows: Sequence[Tensor],
    *,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Return exp of the mean negative log-likelihood of ``windows``, as a vLLM engine sees them.

    Every token of a window but its first is predicted from those before it; windows share nothing.

    Args:
        folder: The checkpoint.
        windows: Token ids, int64 ``[length]`` each.
        dtype: None is the checkpoint's own where the machine computes in it, else float32.
        quantization: As vLLM takes it; None leaves it to the checkpoint.
        on_window: Told how many windows are done, of how many.

    Raises:
        ServingError: The checkpoint cannot be served, or a window is too long for it.
        NumericalError: The perplexity is not finite.
        MissingExtraError: vLLM is not installed.
    """
    model = ServedModel.open(folder)
    longest = longest_window(model, windows)
    options = engine_options(
        model, max_model_len=longest + 1, dtype=dtype, quantization=quantization
    )
    with Engine(options) as engine:
        return engine_perplexity(engine, windows, on_window)


def engine_perplexity(
    engine: ScoringEngine,
    windows: Sequence[Tensor],
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Return the perplexity of ``windows`` from an engine that is already up.

    Raises:
        ServingError: The engine failed.
        NumericalError: The perplexity is not finite.
    """
    total, tokens = 0.0, 0
    for number, window in enumerate(windows):
        total += sum(engine.negative_log_likelihoods([window]))
        tokens += len(window) - 1
        on_window(number + 1, len(windows))
    return PerplexityResult.from_negative_log_likelihood(total, tokens)


def longest_window(model: ServedModel, windows: Sequence[Tensor]) -> int:
    """Return the length of the longest window.

    Raises:
        ServingError: There are no windows, or one is longer than the model takes.
    """
    if not windows:
        raise ServingError(f"{model.folder}: no windows of text to evaluate: give more text")
    longest = max(len(window) for window in windows)
    if model.max_positions is not None and longest > model.max_positions:
        raise ServingError(
            f"{model.folder}: a window of {longest} tokens is longer than the "
            f"{model.max_positions} the model takes: give a smaller --sequence-length"
        )
    return longest
