"""Reading text and cutting token windows from it."""

from sparseserve.text.documents import Conversation, TextFile, TextSource
from sparseserve.text.sources import read_text
from sparseserve.text.windows import (
    calibration_windows,
    evaluation_windows,
    fit_sequence_length,
    position_limit,
    vocabulary_size,
)

__all__ = [
    "Conversation",
    "TextFile",
    "TextSource",
    "calibration_windows",
    "evaluation_windows",
    "fit_sequence_length",
    "position_limit",
    "read_text",
    "vocabulary_size",
]
