"""Reading text and cutting windows from it."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.testing import tiny_tokenizer
from sparseserve.text import (
    TextSource,
    calibration_windows,
    evaluation_windows,
    fit_sequence_length,
    position_limit,
    read_text,
    windows,
)
from sparseserve.text.files import ReadLimits


def bos_tokenizer(*, end: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that puts ``<s>`` before every text and, if asked, ``</s>`` after it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return tokenizer


def source_of(text: str) -> TextSource:
    return TextSource("sample", (text,), ())


def letters(count: int) -> str:
    """Text of ``count`` tokens for the byte tokenizer, in which places can be told apart."""
    return "".join(chr(33 + (index * index + index // 7) % 90) for index in range(count))


def test_a_file_is_one_document_with_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Füße\n\nund mehr".encode())
    source = read_text(str(path))
    assert source.documents == ("Füße\n\nund mehr",)
    assert source.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "z.md").write_text("last")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "sub" / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third"}\n')
    (tmp_path / "picture.bin").write_bytes(b"\xff")
    source = read_text(tmp_path)
    assert source.documents == ("first", "second", "third", "last")
    assert [file.name for file in source.files] == ["a.txt", "sub/b.jsonl", "z.md"]


def test_line_separators_inside_a_json_string_do_not_cut_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8")
    assert read_text(path).documents == ("one\u2028two",)


def test_the_packaged_texts_share_no_paragraph_but_a_salutation() -> None:
    calibration, evaluation = (
        {
            line
            for line in read_text(None, packaged=name).text(tiny_tokenizer()).split("\n")
            if len(line) > 80
        }
        for name in ("calibration", "evaluation")
    )
    assert len(calibration) > 1000
    assert len(evaluation) > 200
    assert all(line.startswith("Mr. Speaker, ") for line in calibration & evaluation)


def test_the_packaged_texts_are_the_ones_their_notice_describes() -> None:
    notice = (Path(__file__).parents[3] / "sparseserve" / "data" / "README.md").read_text()
    for name in ("calibration", "evaluation"):
        assert read_text(None, packaged=name).files[0].sha256 in notice


@pytest.mark.parametrize("form", ["{}:default", "{}:default:train"])
def test_a_dataset_gives_its_text_column(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = {"title": ["x", "y"], "text": ["one", "two"]}
    Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    source = read_text(form.format(folder))
    assert source.documents == ("one", "two")
    assert source.files[0].sha256 == hashlib.sha256(b"one\n\ntwo").hexdigest()


def test_a_dataset_without_a_text_column_is_refused_with_its_columns(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    Dataset.from_dict({"question": ["x"], "answer": ["y"]}).to_parquet(folder / "train.parquet")
    with pytest.raises(CalibrationError, match=r"no column 'text'.*question, answer"):
        read_text(f"{folder}:default")


def test_a_dataset_is_cut_after_a_bounded_number_of_characters(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    Dataset.from_dict({"text": ["0123456789"] * 9}).to_parquet(folder / "train.parquet")
    limits = ReadLimits(beginning=25)
    assert len(read_text(f"{folder}:default", limits=limits).documents) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "is empty"),
        ("a.txt", b"good \xff bad", "byte 0xff at offset 5"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "x"}\n',
            "a.jsonl line 2 has no column 'text': its columns are txt",
        ),
        ("a.jsonl", b'{"text": "x"', "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'["text"]', "line 1 is not an object"),
    ],
)
def test_text_that_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_text(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["nowhere.txt", "./nowhere", "/nowhere/at/all", Path("none")])
def test_a_path_that_is_missing_is_not_taken_for_a_dataset(missing: str | Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        read_text(missing)


def test_a_name_that_is_nothing_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="no dataset that can be loaded") as caught:
        read_text("no-such-dataset-anywhere")
    assert "\n" not in str(caught.value)


def test_evaluation_windows_tile_the_text_from_its_start() -> None:
    text = letters(103)
    tokenizer = tiny_tokenizer()
    cut = evaluation_windows(tokenizer, source_of(text), sequence_length=10)
    assert "".join(tokenizer.decode(window) for window in cut) == text[:100]


def test_fewer_evaluation_windows_are_spread_over_the_same_tiling() -> None:
    source = source_of(letters(103))
    tokenizer = tiny_tokenizer()
    every = evaluation_windows(tokenizer, source, sequence_length=10)
    few = evaluation_windows(tokenizer, source, sequence_length=10, samples=4)
    for window, number in zip(few, (0, 2, 5, 7), strict=True):
        assert window.equal(every[number])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    length=st.integers(2, 40),
    samples=st.integers(1, 12),
    extra=st.integers(0, 300),
    seed=st.integers(0, 5),
)
def test_calibration_windows_come_from_the_text_and_do_not_overlap(
    length: int, samples: int, extra: int, seed: int
) -> None:
    stream = torch.arange(length * samples + extra)
    starts = windows._random_starts(
        windows.TokenStream("sample", stream, ()), length, samples=samples, seed=seed
    )
    assert len(starts) == samples
    assert starts[0] >= 0
    assert starts[-1] + length <= len(stream)
    assert all(after - before >= length for before, after in itertools.pairwise(starts))


def test_calibration_windows_reach_every_part_of_the_text() -> None:
    stream = windows.TokenStream("sample", torch.arange(1000), ())
    starts = [
        start
        for seed in range(200)
        for start in windows._random_starts(stream, 10, samples=5, seed=seed)
    ]
    shares = torch.histc(torch.tensor(starts, dtype=torch.float32), bins=10, min=0, max=1000) / 1000
    assert shares.min() > 0.06
    assert shares.max() < 0.14


def test_a_seed_decides_the_calibration_windows() -> None:
    source = source_of(letters(2000))

    def draw(seed: int) -> torch.Tensor:
        cut = calibration_windows(
            tiny_tokenizer(), source, samples=8, sequence_length=32, seed=seed
        )
        return torch.stack(cut)

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))


def test_windows_overlap_only_if_the_text_is_too_short_and_then_this_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = source_of(letters(100))
    tokenizer = tiny_tokenizer()
    cut = calibration_windows(tokenizer, source, samples=4, sequence_length=40, seed=0)
    assert [tokenizer.decode(window) for window in cut] == [
        str(source.documents[0])[start : start + 40] for start in (0, 20, 40, 60)
    ]
    assert "the windows overlap" in caplog.text


@pytest.mark.parametrize("end", [False, True])
def test_every_window_starts_with_bos_where_the_tokenizer_does(end: bool) -> None:
    tokenizer = bos_tokenizer(end=end)
    text = letters(100)
    tiled = evaluation_windows(tokenizer, source_of(text), sequence_length=11)
    drawn = calibration_windows(tokenizer, source_of(text), samples=3, sequence_length=11, seed=0)
    for window in (*tiled, *drawn):
        assert window.shape == (11,)
        assert window[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in window
    assert "".join(tokenizer.decode(window[1:]) for window in tiled) == text


def test_a_long_text_gives_the_same_tokens_as_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = tuple(f"{letters(40)} {index}\n{letters(30)}" for index in range(20))
    source = TextSource("sample", (*documents, "unbroken" * 50), ())
    whole = windows.token_stream(tiny_tokenizer(), source).tokens
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 100)
    assert windows.token_stream(tiny_tokenizer(), source).tokens.equal(whole)
    assert tiny_tokenizer().decode(whole) == "\n\n".join((*documents, "unbroken" * 50))


@pytest.mark.parametrize("cut", [calibration_windows, evaluation_windows])
def test_text_shorter_than_a_window_is_refused_with_both_lengths(cut) -> None:  # type: ignore[no-untyped-def]
    extra = {"samples": 1, "seed": 0} if cut is calibration_windows else {}
    with pytest.raises(
        CalibrationError,
        match=r"sample has 213 tokens, one window needs 512: .* --sequence-length 128",
    ):
        cut(tiny_tokenizer(), source_of(letters(213)), sequence_length=512, **extra)


def test_more_windows_than_there_are_is_refused_with_their_number() -> None:
    source = source_of(letters(50))
    with pytest.raises(CalibrationError, match="has 5 windows of 10 tokens, 6 are asked for"):
        evaluation_windows(tiny_tokenizer(), source, sequence_length=10, samples=6)
    with pytest.raises(CalibrationError, match="has 41 windows of 10 tokens, 42 are asked for"):
        calibration_windows(tiny_tokenizer(), source, samples=42, sequence_length=10, seed=0)


def test_numbers_that_make_no_window_are_refused() -> None:
    source = source_of(letters(50))
    with pytest.raises(RecipeError, match="--samples 0"):
        evaluation_windows(tiny_tokenizer(), source, sequence_length=10, samples=0)
    with pytest.raises(RecipeError, match="--sequence-length 1 leaves nothing to predict"):
        evaluation_windows(bos_tokenizer(), source, sequence_length=1)


@pytest.mark.parametrize(("stated", "limit"), [(64, 64), (-1, None), (0, None), (None, None)])
def test_a_model_that_takes_any_length_has_no_limit(stated: int | None, limit: int | None) -> None:
    assert position_limit(PretrainedConfig(max_position_embeddings=stated)) == limit
    assert position_limit(PretrainedConfig()) is None


def test_the_sequence_length_stays_within_the_model() -> None:
    assert fit_sequence_length(None, limit=64, default=512) == 64
    assert fit_sequence_length(None, limit=None, default=512) == 512
    assert fit_sequence_length(64, limit=64, default=512) == 64
    with pytest.raises(RecipeError, match="65 is longer than the model takes: at most 64"):
        fit_sequence_length(65, limit=64, default=512)
