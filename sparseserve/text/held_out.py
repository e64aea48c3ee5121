"""Windows that are held out: of a text, or of the calibration windows themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.errors import CalibrationError
from sparseserve.text import TextSource
from sparseserve.text.windows import token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def held_out_count(share: float, total: int) -> int:
    """Return how many of ``total`` windows a ``share`` of them is: at least one."""
    return max(1, round(share * total))


def spread_places(count: int, total: int) -> tuple[int, ...]:
    """Return ``count`` of ``total`` places, ascending, spread evenly over them."""
    return tuple((2 * index + 1) * total // (2 * count) for index in range(count))


def held_out_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    used: Sequence[Tensor],
    samples: int,
    sequence_length: int,
    purpose: str,
    remedy: str,
) -> list[Tensor]:
    """Cut windows, int64 ``[sequence_length]`` each, that share no place with those ``used``.

    They neither overlap each other nor any occurrence of a used window in ``source``, and are
    spread over what is left of it.

    Args:
        tokenizer: The model's.
        source: Any text; it need not be the one that the used windows are from.
        used: Calibration windows, each with the tokens the model expects before every text.
        samples: How many windows to cut.
        sequence_length: Their tokens.
        purpose: What they are needed to do, for the message.
        remedy: What else helps, likewise.

    Raises:
        RecipeError: No text would fit into the window.
        CalibrationError: Too little text is left.
    """
    stream = token_stream(tokenizer, source)
    body = stream.window_body(sequence_length)
    free = torch.ones(len(stream.tokens), dtype=torch.bool)
    for window in used:
        text = window[len(stream.prefix) :]
        for start in _occurrences(stream.tokens, text):
            free[start : start + len(text)] = False
    starts = [place for start, stop in _runs(free) for place in range(start, stop - body + 1, body)]
    if len(starts) < samples:
        raise CalibrationError(
            f"{source.name} has {len(starts)} windows of {sequence_length} tokens outside of the "
            f"calibration windows, {samples} are needed to {purpose}: give more text, "
            f"fewer --samples, or {remedy}"
        )
    chosen = [starts[index * len(starts) // samples] for index in range(samples)]
    return stream.windows(chosen, body)


def _occurrences(tokens: Tensor, part: Tensor) -> Iterator[int]:
    """Yield every place of ``part`` in ``tokens``, both int64."""
    haystack, needle = (item.numpy().astype("<i8").tobytes() for item in (tokens, part))
    place = haystack.find(needle)
    while needle and place >= 0:
        if place % 8 == 0:
            yield place // 8
        place = haystack.find(needle, place + 1)


def _runs(free: Tensor) -> list[tuple[int, int]]:
    """Return start and stop of every stretch of True."""
    closed = torch.zeros(len(free) + 2, dtype=torch.int8)
    closed[1:-1] = free
    edges = closed.diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
