"""Calibration windows: what they are drawn from, and a record that identifies them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.errors import RecipeError
from sparseserve.text import TextFile, calibration_windows, fit_sequence_length, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which windows to calibrate with.

    ``source`` is a file, a folder, a dataset name, or None for the packaged text.
    ``sequence_length`` None means DEFAULT_SEQUENCE_LENGTH, or what the model takes if that is less.
    """

    source: str | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples} must be at least 1")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise RecipeError(f"--sequence-length {self.sequence_length} must be at least 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a report says of the calibration: enough to tell whether two runs used the same tokens.

    ``digest`` is the SHA-256 of all token ids, window after window, as little-endian int64.
    """

    name: str
    sources: tuple[TextFile, ...]
    samples: int
    sequence_length: int
    seed: int
    tokens: int
    digest: str


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Windows of token ids, int64 ``[sequence_length]`` each, and their record."""

    windows: tuple[Tensor, ...]
    record: CalibrationRecord


def load_calibration(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> CalibrationSet:
    """Read the text of ``spec`` and cut its windows, for a model of ``max_length`` positions.

    Raises:
        RecipeError: windows are longer than ``max_length``.
        CalibrationError: the text is missing, unreadable or too short.
    """
    length = fit_sequence_length(
        spec.sequence_length, limit=max_length, default=DEFAULT_SEQUENCE_LENGTH
    )
    source = read_text(spec.source)
    windows = calibration_windows(
        tokenizer, source, samples=spec.samples, sequence_length=length, seed=spec.seed
    )
    record = CalibrationRecord(
        name=source.name,
        sources=source.files,
        samples=len(windows),
        sequence_length=length,
        seed=spec.seed,
        tokens=sum(len(window) for window in windows),
        digest=_digest(windows),
    )
    return CalibrationSet(tuple(windows), record)


def _digest(windows: list[Tensor]) -> str:
    return hashlib.sha256(torch.stack(windows).numpy().astype("<i8").tobytes()).hexdigest()
