"""Windows as published evaluations cut them, so that perplexities can be set beside tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Protocol = Literal["wikitext2"]
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"
WIKITEXT2_LENGTH = 2048


def wikitext2_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    sequence_length: int | None = None,
    limit: int | None = None,
    samples: int | None = None,
) -> list[Tensor]:
    """Cut ``source`` as the evaluation of SparseGPT, and of the papers after it, cuts WikiText-2.

    All documents are joined by blank lines and tokenised once, with the special tokens that the
    tokenizer adds to a text: for Llama one mark, which stands in the first window only. Whole
    windows are cut from the start; the rest is dropped. The published loss weighs the mean loss of
    a window by all of its tokens. As all windows are equally long, the perplexity is that of the
    mean over the predicted tokens, those of every window but its first.

    Args:
        tokenizer: The model's.
        source: The rows of the test split, as the data set has them.
        sequence_length: Tokens of a window; None is WIKITEXT2_LENGTH.
        limit: How many positions the model has; None is any number.
        samples: Take this many windows, spread over the text, instead of all.

    Returns:
        Windows, int64 ``[sequence_length]`` each.

    Raises:
        RecipeError: A number is too small, or the windows are longer than the model takes.
        CalibrationError: The text has fewer windows.
    """
    length = _checked_length(sequence_length, limit)
    ids = tokenizer(source.text(tokenizer), verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    available = len(tokens) // length
    count = available if samples is None else samples
    if count < 1 and samples is not None:
        raise RecipeError(f"--samples {samples} must be at least 1")
    if available < max(count, 1):
        raise CalibrationError(
            f"{source.name} has {len(tokens)} tokens, which are {available} windows of {length}, "
            f"{max(count, 1)} are needed: give more text, or a smaller --sequence-length"
        )
    windows = tokens[: available * length].reshape(available, length)
    return [windows[index * available // count] for index in range(count)]


def _checked_length(asked: int | None, limit: int | None) -> int:
    length = WIKITEXT2_LENGTH if asked is None else asked
    if length < 2:
        raise RecipeError(f"--sequence-length {length} must be at least 2")
    if limit is not None and length > limit:
        raise RecipeError(
            f"--protocol wikitext2 with windows of {length} tokens asks for more than the model "
            f"takes: give --sequence-length {limit} or less, and compare with figures of that "
            "length only"
        )
    return length
