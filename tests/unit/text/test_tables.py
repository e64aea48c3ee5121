"""Texts in tables and chats: nothing about them is guessed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from datasets import Dataset

from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.testing import tiny_tokenizer
from sparseserve.text import Conversation, TextSource, evaluation_windows, read_text
from sparseserve.text.calibration import CalibrationSpec, load_calibration

Writer = Callable[[Path, list[dict[str, object]]], object]


def json_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def dataset(path: Path, rows: list[dict[str, object]]) -> None:
    path.mkdir()
    json_lines(path / "train.jsonl", rows)


WRITERS: dict[str, Writer] = {
    "jsonl": json_lines,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "csv": lambda path, rows: Dataset.from_list(rows).to_csv(path, index=False),
    "parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
}
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": 'Yes, "you".'}]
RENDERED = 'user: Hello?\nassistant: Yes, "you".\n'


def refusal(source: str | Path, **options: str) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_text(source, **options)  # type: ignore[arg-type]  # only columns are given
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_a_table_is_read_by_its_text_column_whatever_the_case_of_its_ending(
    tmp_path: Path, ending: str, change: Callable[[str], str]
) -> None:
    texts = ["One,\n\ntwo.", 'Three "four" Füße.', "NA", "null", "7", ""]
    rows: list[dict[str, object]] = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    path = tmp_path / f"a.{change(ending)}"
    WRITERS[ending](tmp_path / f"b.{ending}", rows)
    (tmp_path / f"b.{ending}").rename(path)
    assert read_text(path).documents == tuple(texts)
    assert read_text(tmp_path).documents == tuple(texts)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_column_of_another_name_must_be_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    WRITERS[ending](path, [{"content": "x y", "source": "web"}, {"content": "z", "source": "web"}])
    assert "its columns are content, source" in (message := refusal(path))
    assert "--text-column" in message
    assert read_text(path, column="content").documents == ("x y", "z")
    assert "no column 'contents'" in (message := refusal(path, column="contents"))
    assert "its columns are content, source" in message


def test_a_lone_column_of_strings_is_no_text_unless_it_is_named(tmp_path: Path) -> None:
    dataset(tmp_path / "ids", [{"source": "web-1", "turns": [1, 2]}] * 3)
    assert "source, turns" in refusal(f"{tmp_path / 'ids'}:default")
    assert read_text(f"{tmp_path / 'ids'}:default", column="source").documents == ("web-1",) * 3


def test_text_beside_messages_is_ambiguous(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [{"text": "x", "messages": CHAT}])
    assert "both 'text' and 'messages'" in refusal(tmp_path / "a.jsonl")
    assert read_text(tmp_path / "a.jsonl", column="text").documents == ("x",)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_rows_that_hold_null_are_skipped_and_counted(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, object]] = [{"text": None if i % 2 else f"s{i}"} for i in range(5)]
    WRITERS[ending](tmp_path / f"a.{ending}", rows)
    with caplog.at_level(logging.WARNING):
        source = read_text(tmp_path / f"a.{ending}")
    assert source.documents == ("s0", "s2", "s4")
    assert source.skipped == 2
    assert "2 rows hold no text (null) and are skipped" in caplog.text


def test_a_record_of_calibration_says_how_many_rows_were_skipped(tmp_path: Path) -> None:
    dataset(tmp_path / "set", [{"text": None}, {"text": "many words " * 20}])
    spec = CalibrationSpec(source=f"{tmp_path / 'set'}:default", samples=2, sequence_length=16)
    assert load_calibration(spec, tiny_tokenizer(), None).record.skipped_rows == 1


def test_nothing_but_null_is_an_empty_text(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [{"text": None}])
    assert "is empty" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("value", [5, True, {"a": "b"}, 1.5])
def test_a_value_that_is_no_text_is_refused_with_its_place(tmp_path: Path, value: object) -> None:
    json_lines(tmp_path / "a.jsonl", [{"text": "x"}, {"text": value}])
    assert "a.jsonl line 2, column 'text', holds no text" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "dataset"])
def test_a_chat_is_rendered_with_the_models_template(tmp_path: Path, ending: str) -> None:
    rows: list[dict[str, object]] = [{"messages": CHAT, "source": "synthetic"}] * 2
    path = tmp_path / f"a.{ending}"
    (dataset if ending == "dataset" else WRITERS[ending])(path, rows)
    source = read_text(f"{path}:default" if ending == "dataset" else path)
    assert source.text(tiny_tokenizer()) == RENDERED * 2
    window = evaluation_windows(tiny_tokenizer(), source, sequence_length=len(RENDERED))[0]
    assert tiny_tokenizer().decode(window) == RENDERED


@pytest.mark.parametrize(
    "extra", [date(2026, 1, 2), datetime(2026, 1, 2, 3), b"\xff\x00", Decimal("1.5"), [b"a"]]
)
def test_a_chat_may_hold_what_json_has_no_form_for(tmp_path: Path, extra: object) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [{**message, "extra": extra} for message in CHAT]}
    ]
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    source = read_text(tmp_path / "a.parquet")
    assert "Hello?" in str(source.documents[0])
    assert source.text(tiny_tokenizer()) == RENDERED


def test_prose_and_chats_of_one_folder_are_parted_by_blank_lines(tmp_path: Path) -> None:
    json_lines(tmp_path / "b.jsonl", [{"messages": CHAT}])
    (tmp_path / "a.txt").write_text("Prose.")
    (tmp_path / "c.txt").write_text("More.")
    assert read_text(tmp_path).text(tiny_tokenizer()) == f"Prose.\n\n{RENDERED}\n\nMore."


def test_a_chat_is_refused_where_the_model_has_no_template(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"a\.jsonl line 1.* has no chat template") as caught:
        read_text(tmp_path / "a.jsonl").text(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('only one turn') }}", "{% for", "{{ 1 / 0 }}", "{{ a.b.c }}"]
)
def test_a_template_that_fails_names_the_chat(tmp_path: Path, template: str) -> None:
    json_lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(CalibrationError, match=r"line 1.* cannot be rendered") as caught:
        read_text(tmp_path / "a.jsonl").text(tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["Hello"],
        [{"from": "human", "value": "x"}],
        [{"role": 3, "content": "x"}],
        [{"role": "a"}],
    ],
)
def test_messages_of_another_make_are_refused(tmp_path: Path, messages: object) -> None:
    json_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    assert "a.jsonl line 1, column 'messages'" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "row", [{"text": "x \ud800 y"}, {"messages": [{"role": "u", "content": "\udfff"}]}]
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_of_a_surrogate_pair_is_refused(
    tmp_path: Path, row: dict[str, object], kind: str
) -> None:
    WRITERS[kind](tmp_path / f"a.{kind}", [row])
    assert "half of a surrogate pair" in refusal(tmp_path / f"a.{kind}")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a.txt.gz", "is compressed (.gz): unpack it"),
        ("a.ZIP", "is compressed (.ZIP): unpack it"),
        ("a.jsonl.zst", "is compressed (.zst)"),
        ("a.docx", "ends in '.docx'"),
        ("a.bin", "ends in '.bin'"),
        ("words", "ends in nothing"),
    ],
)
def test_a_file_that_does_not_say_what_it_is_is_refused_by_name(
    tmp_path: Path, name: str, part: str
) -> None:
    (tmp_path / name).write_text("Some words.")
    message = refusal(tmp_path / name)
    assert part in message
    assert name in message


def test_compressed_files_of_a_folder_are_refused_and_others_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("Words.")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        assert read_text(tmp_path).documents == ("Words.",)
    assert "1 files are left out, as no text ends in .png" in caplog.text
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b")
    assert "b.txt.gz is compressed" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b"PAR1\x00\xb4\xff"),
        ("a.csv", b"id,text\n1,two,three\n"),
        ("a.csv", b"text,text\n1,2\n"),
        ("a.csv", b"text\n\xff\n"),
        ("a.csv", b""),
        ("a.json", b"["),
        ("a.json", b"[3]"),
        ("a.json", b'{"text":\n "x"}'),
        ("a.json", b"[" * 100_000),
        ("a.jsonl", b'{"text":' * 100_000),
        ("a.jsonl", b"\xff\xfe{\x00"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path / name)


@pytest.mark.parametrize("source", ["a" * 300, "x/" + "b" * 5000, "~nosuchuser/x.txt"])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(source: str) -> None:
    assert source[:20] in refusal(source)


def test_a_column_of_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Words.")
    for source in (tmp_path, tmp_path / "a.txt"):
        assert "leave --text-column body out" in refusal(source, column="body")
    with pytest.raises(CalibrationError, match="leave --text-column body out"):
        read_text(None, column="body")


@pytest.mark.parametrize("copies", [0, 1])
def test_tokens_that_the_model_has_no_row_for_are_refused_before_any_run(
    tmp_path: Path, copies: int
) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 40)
    spec = CalibrationSpec(
        source=str(tmp_path / "a.txt"), samples=2, sequence_length=32, scrambled=copies
    )
    highest = max(tiny_tokenizer().encode("ab "))
    with pytest.raises(CalibrationError, match=f"token id {highest}, .* has {highest} rows"):
        load_calibration(spec, tiny_tokenizer(), None, highest)
    found = load_calibration(spec, tiny_tokenizer(), None, highest + 1)
    assert all(int(window.max()) <= highest for window in found.scrambled)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(RecipeError, match=f"--seed {seed} must be from 0 to"):
        CalibrationSpec(seed=seed)


def test_equal_chats_have_equal_hashes(tmp_path: Path) -> None:
    sources: list[TextSource] = []
    for name in ("one", "two"):
        dataset(tmp_path / name, [{"messages": CHAT}])
        sources.append(read_text(f"{tmp_path / name}:default"))
    assert sources[0].files[0].sha256 == sources[1].files[0].sha256
    assert isinstance(sources[0].documents[0], Conversation)
