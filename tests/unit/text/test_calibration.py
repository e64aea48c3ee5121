"""The calibration set and its record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.testing import tiny_tokenizer
from sparseserve.text.calibration import CalibrationSpec, load_calibration


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


def test_fresh_windows_share_nothing_with_the_others_which_stay(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text(",".join(f"{number:05d}" for number in range(900)))
    spec = CalibrationSpec(source=str(path), samples=9, sequence_length=40, scrambled=0)
    alone = load_calibration(spec, tiny_tokenizer(), None)
    both = load_calibration(spec, tiny_tokenizer(), None, fresh=20)
    assert all(one.equal(other) for one, other in zip(both.windows, alone.windows, strict=True))
    assert alone.for_retraining == alone.windows
    assert both.for_retraining == both.fresh
    assert len(both.fresh) == 20
    # No eight letters occur twice in the text: a shared place would show as a shared piece.
    pieces = [
        tuple(piece.tolist())
        for window in (*both.windows, *both.fresh)
        for piece in window.unfold(0, 8, 1)
    ]
    assert len(set(pieces)) == len(pieces)
    assert both.record.fresh_digest is not None
    assert replace(both.record, fresh_digest=None) == alone.record


def test_a_text_without_fresh_windows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text(",".join(f"{number:05d}" for number in range(100)))
    spec = CalibrationSpec(source=str(path), samples=9, sequence_length=40)
    with pytest.raises(CalibrationError, match=r"needed to train the whole model.*--distill"):
        load_calibration(spec, tiny_tokenizer(), None, fresh=20)


def test_the_packaged_text_calibrates_any_model_by_default() -> None:
    calibration = load_calibration(CalibrationSpec(samples=2), tiny_tokenizer(), max_length=100)
    assert [len(window) for window in calibration.windows] == [100, 100]
    assert calibration.record.name == "packaged calibration.txt"


def test_windows_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"--sequence-length 200 .* at most 100"):
        load_calibration(CalibrationSpec(sequence_length=200), tiny_tokenizer(), max_length=100)


def test_scrambled_copies_keep_half_of_the_tokens_and_all_special_ones(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("a" * 4000)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    spec = CalibrationSpec(source=str(path), samples=3, sequence_length=400, scrambled=2)
    calibration = load_calibration(spec, tokenizer, max_length=None)
    assert len(calibration.scrambled) == 6
    (letter,) = tokenizer.encode("a", add_special_tokens=False)
    for window in calibration.scrambled:
        assert window[0] == tokenizer.bos_token_id
        others = window[1:][window[1:] != letter]
        assert 0.4 < len(others) / len(window) < 0.6
        assert len(set(others.tolist())) > 100
        assert not set(others.tolist()) & set(tokenizer.all_special_ids)
    plain = load_calibration(replace(spec, scrambled=0), tokenizer, max_length=None)
    assert plain.record == calibration.record
    assert not plain.scrambled


def test_scrambled_copies_follow_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 20)

    def copy(seed: int) -> list[int]:
        spec = CalibrationSpec(
            source=str(path), samples=1, sequence_length=64, seed=seed, scrambled=1
        )
        found: list[int] = load_calibration(spec, tiny_tokenizer(), None).scrambled[0].tolist()
        return found

    assert copy(0) == copy(0)
    assert copy(0) != copy(1)


def test_a_specification_without_tokens_is_refused() -> None:
    with pytest.raises(RecipeError, match="--samples 0"):
        CalibrationSpec(samples=0)
    with pytest.raises(RecipeError, match="--sequence-length 1"):
        CalibrationSpec(sequence_length=1)
    with pytest.raises(RecipeError, match="scrambled -1 must not be negative"):
        CalibrationSpec(scrambled=-1)
    with pytest.raises(RecipeError, match="scrambled_layers 0 must be at least 1"):
        CalibrationSpec(scrambled_layers=0)
