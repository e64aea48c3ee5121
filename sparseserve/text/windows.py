"""Cutting token windows: random ones to calibrate with, consecutive ones to evaluate on."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.text.documents import DOCUMENT_SEPARATOR, TextSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

PIECE_CHARACTERS = 1_000_000

logger = logging.getLogger(__name__)


def fit_sequence_length(requested: int | None, *, limit: int | None, default: int) -> int:
    """Return the window length to use with a model that takes at most ``limit`` tokens.

    Raises:
        RecipeError: ``requested`` is longer than the model's ``limit``.
    """
    if requested is None:
        return default if limit is None else min(default, limit)
    if limit is not None and requested > limit:
        raise RecipeError(
            f"--sequence-length {requested} is longer than the model takes: at most {limit}"
        )
    return requested


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the longest sequence a model of this ``config`` takes, or None if it does not say.

    XLNet, which takes any, says -1.
    """
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """Return how many rows the embedding of a model of this ``config`` has, or None."""
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def require_known_tokens(name: str, windows: Iterable[Tensor], rows: int | None) -> None:
    """Refuse token ids that the model's embedding of ``rows`` rows has no row for.

    Raises:
        CalibrationError: Names the id, the limit and the remedy.
    """
    highest = max((int(window.max()) for window in windows if len(window)), default=0)
    if rows is not None and highest >= rows:
        raise CalibrationError(
            f"{name}: the tokenizer gives token id {highest}, but the model's embedding has {rows} "
            "rows (vocab_size in config.json): take the tokenizer that belongs to the model"
        )


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
) -> list[Tensor]:
    """Draw ``samples`` windows, int64 ``[sequence_length]`` each, at random places of ``source``.

    The places are uniform among all those at which windows do not overlap. A text too short for
    that gives evenly spread windows that overlap as little as they can, and this is logged.

    Raises:
        RecipeError: a number is not positive.
        CalibrationError: the text has fewer different windows than ``samples``.
    """
    _check_samples(samples)
    stream = token_stream(tokenizer, source)
    body = stream.window_body(sequence_length)
    places = len(stream.tokens) - body + 1
    if samples > places:
        raise CalibrationError(
            f"{stream.name} has {places} windows of {sequence_length} tokens, "
            f"{samples} are asked for: give more text or --samples {places}"
        )
    starts = _random_starts(stream, body, samples=samples, seed=seed)
    return stream.windows(starts, body)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: TextSource,
    *,
    sequence_length: int,
    samples: int | None = None,
) -> list[Tensor]:
    """Cut ``source`` into consecutive windows, int64 ``[sequence_length]`` each, from its start.

    These are the windows of published perplexities: none overlap, and the tokens after the last
    whole one are left out. Of the N windows there are, ``samples`` takes those numbered
    ``i * N // samples``, spread over the whole text so that a few stand for all; None takes all.

    Raises:
        RecipeError: a number is not positive.
        CalibrationError: the text has fewer windows than ``samples``.
    """
    stream = token_stream(tokenizer, source)
    body = stream.window_body(sequence_length)
    available = len(stream.tokens) // body
    if samples is not None:
        _check_samples(samples)
        if samples > available:
            raise CalibrationError(
                f"{stream.name} has {available} windows of {sequence_length} tokens, "
                f"{samples} are asked for: give more text or --samples {available}"
            )
    count = samples or available
    return stream.windows([index * available // count * body for index in range(count)], body)


@dataclass(frozen=True, slots=True)
class TokenStream:
    """The tokens of a whole source, and what the model expects before any of its windows.

    ``tokens`` is int64 ``[length]`` and holds no special tokens; ``prefix`` is the beginning of
    sequence token of models that have one (Llama, Gemma), else empty.
    """

    name: str
    tokens: Tensor
    prefix: tuple[int, ...]

    def window_body(self, sequence_length: int) -> int:
        """Return how many text tokens a window of ``sequence_length`` tokens holds.

        Raises:
            RecipeError: no text would fit into the window.
            CalibrationError: the source is shorter than one window.
        """
        body = sequence_length - len(self.prefix)
        if sequence_length < 2 or body < 1:
            raise RecipeError(
                f"--sequence-length {sequence_length} leaves nothing to predict: "
                f"at least {max(2, len(self.prefix) + 1)} is needed"
            )
        if body > len(self.tokens):
            remedy = _power_of_two_below(len(self.tokens) + len(self.prefix))
            raise CalibrationError(
                f"{self.name} has {len(self.tokens)} tokens, one window needs {body}: "
                f"give more text" + (f" or --sequence-length {remedy}" if remedy >= 16 else "")
            )
        return body

    def windows(self, starts: Iterable[int], body: int) -> list[Tensor]:
        """Return int64 windows ``[prefix + body]``, one for each of the ``starts``."""
        prefix = torch.tensor(self.prefix, dtype=torch.int64)
        return [torch.cat((prefix, self.tokens[start : start + body])) for start in starts]


def token_stream(tokenizer: PreTrainedTokenizerBase, source: TextSource) -> TokenStream:
    """Tokenise all of ``source``: its documents joined by blank lines, then its conversations.

    The text goes through the tokenizer in pieces of about PIECE_CHARACTERS cut at blank lines, so
    tens of megabytes need little memory; a tokenizer that marks the start of its input adds
    that one mark to each piece.

    Raises:
        CalibrationError: A conversation cannot be rendered for this tokenizer's model.
    """
    text = source.text(tokenizer)
    pieces = [
        torch.tensor(
            tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"],
            dtype=torch.int64,
        )
        for piece in _pieces(text)
    ]
    return TokenStream(source.name, torch.cat(pieces), _window_prefix(tokenizer))


def _random_starts(stream: TokenStream, body: int, *, samples: int, seed: int) -> list[int]:
    """Return ascending window starts: uniform without overlap, or evenly spread if they must."""
    slack = len(stream.tokens) - samples * body
    if slack < 0:
        logger.warning(
            "%s has %d tokens, fewer than %d windows of %d need: the windows overlap",
            stream.name,
            len(stream.tokens),
            samples,
            body,
        )
        last = len(stream.tokens) - body
        return [index * last // (samples - 1) for index in range(samples)]
    generator = random.Random(seed)
    gaps = sorted(int(generator.random() * (slack + 1)) for _ in range(samples))
    return [gap + index * body for index, gap in enumerate(gaps)]


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise RecipeError(f"--samples {samples} must be at least 1")


def _window_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before every text, whatever the text is."""
    empty, letter = (tokenizer(text)["input_ids"] for text in ("", "a"))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(empty, letter, strict=False))
    return tuple(int(first) for first, _ in shared)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cuts = (text.rfind(mark, start + 1, end) for mark in (DOCUMENT_SEPARATOR, "\n", " "))
        cut = next((found for found in cuts if found > start), end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _power_of_two_below(tokens: int) -> int:
    return 1 << max(tokens.bit_length() - 1, 0)
