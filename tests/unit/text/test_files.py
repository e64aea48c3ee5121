"""Texts that are too long, or that have no end, are read as far as is needed, or given up."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.errors import CalibrationError
from sparseserve.text import TextSource, read_text
from sparseserve.text.files import ReadLimits, beginning_of_lines, beginning_of_rows

# Nothing is waited for that is not sure to come.
IMPATIENT = ReadLimits(whole=1000, beginning=100, silence=0.1, seconds=60)
ROWS = [f'row {number}, a "word"' for number in range(999)]


def refusal(path: Path, limits: ReadLimits = IMPATIENT) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_text(path, limits=limits)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written_to(path: Path, write: Callable[[Path], object], limits: ReadLimits) -> TextSource:
    """What is read of a pipe while another thread writes to it."""
    os.mkfifo(path)
    writer = threading.Thread(target=write, args=(path,))
    writer.start()
    try:
        return read_text(path, limits=limits)
    finally:
        writer.join()


def write_for_ever(path: Path) -> None:
    try:
        with path.open("wb", buffering=0) as pipe:
            while True:
                pipe.write(b"one line of a text\n")
    except BrokenPipeError:
        return


def test_a_pipe_without_a_writer_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert "gave 0 bytes, and then neither more nor its end within 0.1 s" in refusal(
        tmp_path / "a.txt"
    )


def test_a_pipe_whose_writer_falls_silent_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    # Opened for both, a pipe has a writer at once.
    writer = os.open(tmp_path / "a.txt", os.O_RDWR)
    os.write(writer, b"some words")
    assert "gave 10 bytes" in refusal(tmp_path / "a.txt")
    os.close(writer)


def test_a_pipe_that_trickles_is_given_up_after_a_while(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    writer = os.open(tmp_path / "a.txt", os.O_RDWR)
    os.write(writer, b"a")
    limits = ReadLimits(silence=60, seconds=0)
    assert "within 0 s" in refusal(tmp_path / "a.txt", limits)
    os.close(writer)


def test_a_pipe_that_ends_is_read_whole(tmp_path: Path) -> None:
    text = "\n".join(ROWS[:4])
    patient = ReadLimits()
    found = written_to(tmp_path / "a.txt", lambda path: path.write_text(text), patient)
    (tmp_path / "b.txt").write_text(text)
    plain = read_text(tmp_path / "b.txt")
    assert found.documents == plain.documents
    assert found.files[0].sha256 == plain.files[0].sha256


def test_a_pipe_that_never_ends_gives_its_first_lines(tmp_path: Path) -> None:
    found = written_to(tmp_path / "a.txt", write_for_ever, ReadLimits(beginning=100))
    assert found.documents == ("one line of a text\n" * 5,)


@pytest.mark.parametrize("device", ["zero", "urandom"])
def test_an_endless_device_is_no_text(tmp_path: Path, device: str) -> None:
    (tmp_path / "a.txt").symlink_to(f"/dev/{device}")
    # Of so many random bytes, some before the last line end are no text.
    limits = replace(IMPATIENT, beginning=10_000)
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text"):
        read_text(tmp_path / "a.txt", limits=limits)


def test_a_long_line_of_bytes_that_are_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" * 1000)
    with pytest.raises(CalibrationError, match=r"a\.txt is not UTF-8 text: byte 0xff at offset 0"):
        read_text(tmp_path / "a.txt", limits=IMPATIENT)


@settings(max_examples=200)
@given(st.text(alphabet="aé€😀", max_size=12), st.integers(0, 3))
def test_a_line_that_was_cut_loses_its_last_character_and_nothing_else(text: str, cut: int) -> None:
    whole = text.encode()
    data = whole[: max(0, len(whole) - cut)]
    found = beginning_of_lines(data)
    assert whole.startswith(found)
    assert len(data) - len(found) < 4
    assert found.decode() == data.decode(errors="ignore")
    # A byte that begins no character is no cut one: it is not dropped in silence.
    assert beginning_of_lines(b"\xff" + data) == b"\xff" + data


def test_a_file_of_terabytes_without_text_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CalibrationError, match="a zero byte at offset 0"):
        read_text(tmp_path / "a.txt")


def test_a_file_of_terabytes_gives_its_first_lines(tmp_path: Path) -> None:
    with (tmp_path / "a.md").open("wb") as file:
        file.write(b"words of a line\n" * 10)
        file.truncate(2**40)
    found = read_text(tmp_path / "a.md", limits=IMPATIENT)
    assert found.documents == ("words of a line\n" * 6,)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_long_table_gives_its_first_rows(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    table = Dataset.from_dict({"text": ROWS})
    if ending in ("jsonl", "json"):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    elif ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    found = read_text(path, limits=IMPATIENT)
    assert 1 < len(found.documents) < 10
    assert list(found.documents) == ROWS[: len(found.documents)]


def test_a_long_list_and_an_endless_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    assert "write a part of it as .jsonl" in refusal(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text('text\n"' + "no end\n" * 999)
    (tmp_path / "b.csv").write_text("text," * 999)
    assert "no whole row in its first 100 bytes" in refusal(tmp_path / "b.csv")


def test_of_a_long_folder_the_first_files_are_read(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("words " * 50)
    found = read_text(tmp_path, limits=IMPATIENT)
    assert [file.name for file in found.files] == ["0.txt", "1.txt", "2.txt", "3.txt"]


@given(st.text("aé\n", min_size=0, max_size=40), st.integers(0, 40))
def test_a_beginning_ends_with_a_line_or_a_character(text: str, place: int) -> None:
    data = text.encode()[:place]
    kept = beginning_of_lines(data)
    assert data.startswith(kept)
    assert text.startswith(kept.decode())
    assert kept.endswith(b"\n") or b"\n" not in data


@given(st.lists(st.text('a"\n,', max_size=5), max_size=6), st.integers(0, 60))
def test_a_beginning_of_rows_holds_whole_ones(cells: list[str], place: int) -> None:
    quoted = ['"' + cell.replace('"', '""') + '"\n' for cell in cells]
    wholes = ["".join(quoted[:count]).encode() for count in range(len(quoted) + 1)]
    data = wholes[-1][:place]
    assert beginning_of_rows(data) == max((row for row in wholes if data.startswith(row)), key=len)
