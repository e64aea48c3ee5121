"""Reading text and cutting token windows from it."""

from sparseserve.text.sources import TextFile, TextSource, read_text
from sparseserve.text.windows import (
    calibration_windows,
    evaluation_windows,
    fit_sequence_length,
    position_limit,
)

__all__ = [
    "TextFile",
    "TextSource",
    "calibration_windows",
    "evaluation_windows",
    "fit_sequence_length",
    "position_limit",
    "read_text",
]
