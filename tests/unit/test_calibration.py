"""The calibration set and its record."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sparseserve.calibration import CalibrationSpec, load_calibration
from sparseserve.errors import RecipeError
from sparseserve.testing import tiny_tokenizer


def test_the_record_says_what_the_windows_are(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)
    spec = CalibrationSpec(source=str(path), samples=3, sequence_length=16, seed=5)
    calibration = load_calibration(spec, tiny_tokenizer(), max_length=64)
    record = calibration.record
    assert [window.shape for window in calibration.windows] == [(16,)] * 3
    assert (record.samples, record.sequence_length, record.seed, record.tokens) == (3, 16, 5, 48)
    assert record.sources[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    ids = [int(token) for window in calibration.windows for token in window]
    plain = b"".join(token.to_bytes(8, "little") for token in ids)
    assert record.digest == hashlib.sha256(plain).hexdigest()


def test_equal_settings_give_equal_records_and_another_seed_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(str(number) for number in range(2000)))

    def record(seed: int) -> object:
        spec = CalibrationSpec(source=str(path), samples=4, sequence_length=32, seed=seed)
        return load_calibration(spec, tiny_tokenizer(), None).record

    assert record(0) == record(0)
    assert record(0) != record(1)


def test_the_packaged_text_calibrates_any_model_by_default() -> None:
    calibration = load_calibration(CalibrationSpec(samples=2), tiny_tokenizer(), max_length=100)
    assert [len(window) for window in calibration.windows] == [100, 100]
    assert calibration.record.name == "packaged calibration.txt"


def test_windows_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"--sequence-length 200 .* at most 100"):
        load_calibration(CalibrationSpec(sequence_length=200), tiny_tokenizer(), max_length=100)


def test_a_specification_without_tokens_is_refused() -> None:
    with pytest.raises(RecipeError, match="--samples 0"):
        CalibrationSpec(samples=0)
    with pytest.raises(RecipeError, match="--sequence-length 1"):
        CalibrationSpec(sequence_length=1)
