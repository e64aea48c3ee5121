"""Calibration windows: what they are drawn from, and a record that identifies them.

What the first decoder layers see depends on single tokens more than on sentences, and a
calibration text holds a small part of the vocabulary. So these layers can be shown scrambled
copies of the windows, too: with half of the tokens, at random places, drawn anew from the whole
vocabulary. No text is needed for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.text import (
    TextFile,
    TextSource,
    calibration_windows,
    fit_sequence_length,
    read_text,
)
from sparseserve.text.held_out import held_out_windows
from sparseserve.text.windows import require_known_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQUENCE_LENGTH = 512
MOST_SCRAMBLED = 1000
_SCRAMBLED_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which windows to calibrate with.

    ``source`` is a file, a folder, a dataset name, or None for the packaged text. ``text_column``
    is the column of its tables; None is ``text``, or ``messages`` for chats.
    ``sequence_length`` None means DEFAULT_SEQUENCE_LENGTH, or what the model takes if that is less.
    ``scrambled`` is how many scrambled copies of each window the first ``scrambled_layers`` decoder
    layers see beside it.
    """

    source: str | None = None
    samples: int = 256
    sequence_length: int | None = None
    seed: int = 0
    scrambled: int = 1
    scrambled_layers: int = 4
    text_column: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples} must be at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise RecipeError(f"--sequence-length {self.sequence_length} must be at least 2")
        require_seed(self.seed)
        if self.scrambled > MOST_SCRAMBLED:
            raise RecipeError(f"--scrambled {self.scrambled} must be at most {MOST_SCRAMBLED}")
        if self.scrambled < 0 or self.scrambled_layers < 1:
            raise RecipeError(
                f"calibration: scrambled {self.scrambled} must not be negative, scrambled_layers "
                f"{self.scrambled_layers} must be at least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a report says of the calibration: enough to tell whether two runs used the same tokens.

    ``digest`` is the SHA-256 of all token ids, window after window, as little-endian int64.
    ``skipped_rows`` counts the rows of the text's tables that held no text. ``fresh_digest`` is the
    digest of the windows that only retraining sees; None where there are none.
    """

    name: str
    sources: tuple[TextFile, ...]
    samples: int
    sequence_length: int
    seed: int
    tokens: int
    digest: str
    skipped_rows: int = 0
    fresh_digest: str | None = None


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Windows of token ids, int64 ``[sequence_length]`` each, and their record.

    Attributes:
        windows: Of the text.
        record: Of ``windows``.
        scrambled: Scrambled copies of them.
        scrambled_layers: How many decoder layers, from the first on, see the copies.
        fresh: Windows that share nothing with the others, for retraining.
    """

    windows: tuple[Tensor, ...]
    record: CalibrationRecord
    scrambled: tuple[Tensor, ...] = ()
    scrambled_layers: int = 0
    fresh: tuple[Tensor, ...] = ()

    @property
    def for_retraining(self) -> tuple[Tensor, ...]:
        """The windows that the whole model is trained on."""
        return self.fresh or self.windows


def load_calibration(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    vocabulary: int | None = None,
    *,
    fresh: int = 0,
) -> CalibrationSet:
    """Read the text of ``spec`` and cut its windows.

    Args:
        spec: Which windows.
        tokenizer: The model's.
        max_length: How many positions the model has; None is any number.
        vocabulary: How many rows its embedding has; None is enough for every token.
        fresh: How many windows to cut from what the others leave of the text.

    Raises:
        RecipeError: windows are longer than ``max_length``.
        CalibrationError: the text is missing, unreadable or too short, or its tokens are not the
            model's.
    """
    length = fit_sequence_length(
        spec.sequence_length, limit=max_length, default=DEFAULT_SEQUENCE_LENGTH
    )
    source = read_text(spec.source, column=spec.text_column)
    windows = calibration_windows(
        tokenizer, source, samples=spec.samples, sequence_length=length, seed=spec.seed
    )
    require_known_tokens(source.name, windows, vocabulary)
    others = _fresh(windows, source, tokenizer, fresh, length) if fresh else []
    require_known_tokens(source.name, others, vocabulary)
    record = CalibrationRecord(
        name=source.name,
        sources=source.files,
        samples=len(windows),
        sequence_length=length,
        seed=spec.seed,
        tokens=sum(len(window) for window in windows),
        digest=_digest(windows),
        skipped_rows=source.skipped,
        fresh_digest=_digest(others) if others else None,
    )
    scrambled = tuple(_scrambled(windows, spec, tokenizer, vocabulary))
    return CalibrationSet(
        tuple(windows), record, scrambled, spec.scrambled_layers, fresh=tuple(others)
    )


def _fresh(
    windows: list[Tensor],
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
) -> list[Tensor]:
    return held_out_windows(
        tokenizer,
        source,
        used=windows,
        samples=samples,
        sequence_length=length,
        purpose="train the whole model on text that pruning does not see",
        remedy="fewer windows with --distill",
    )


def _scrambled(
    windows: list[Tensor],
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
) -> Iterator[Tensor]:
    """Yield copies of ``windows`` with half of the tokens replaced; special ones stay."""
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
    # Without tokens that were added later, which the model may know nothing of.
    size = tokenizer.vocab_size if vocabulary is None else min(tokenizer.vocab_size, vocabulary)
    every = torch.arange(size)
    ordinary = every[~torch.isin(every, special)]
    generator = torch.Generator().manual_seed(spec.seed)
    for window in windows * spec.scrambled:
        drawn = ordinary[torch.randint(len(ordinary), window.shape, generator=generator)]
        replaced = torch.rand(window.shape, generator=generator) < _SCRAMBLED_SHARE
        yield torch.where(replaced & ~torch.isin(window, special), drawn, window)


def require_seed(seed: int) -> None:
    """Refuse what no generator takes.

    Raises:
        RecipeError: It is negative, or longer than 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise RecipeError(f"--seed {seed} must be from 0 to {2**63 - 1}")


def _digest(windows: list[Tensor]) -> str:
    return hashlib.sha256(torch.stack(windows).numpy().astype("<i8").tobytes()).hexdigest()
