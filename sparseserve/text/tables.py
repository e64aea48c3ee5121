"""Texts in tables: JSON, JSON Lines, CSV and Parquet files, and the rows of datasets.

A table is read by one column: the one that the user named, else ``text`` or, for chats,
``messages``. Nothing else is guessed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from sparseserve.errors import CalibrationError, first_line
from sparseserve.paths import shown
from sparseserve.text.documents import Document, conversation, require_characters

# Rows of a Parquet file that are in memory at once; a row may be a book.
_BATCH_ROWS = 1024
TEXT_COLUMN = "text"
CHAT_COLUMN = "messages"

#: Rows of a table, each with the place it stands at.
Rows: TypeAlias = Iterable[tuple[str, Mapping[str, object]]]


def table_documents(name: str, rows: Rows, column: str | None) -> Iterator[Document | None]:
    """Yield the document or conversation of each row, None for a row that holds null.

    Args:
        name: Of the table, for messages.
        rows: Its rows.
        column: The one to read; None is ``text``, or ``messages`` of a chat.

    Raises:
        CalibrationError: The column is missing or cannot be told, or holds no text.
    """
    chosen = None
    for place, row in rows:
        chosen = chosen or _chosen_column(name, list(row), column)
        if chosen not in row:
            raise CalibrationError(
                f"{place} has no column '{chosen}': its columns are {_listed(list(row))}"
            )
        yield _document(f"{place}, column '{chosen}',", row[chosen], named=column is not None)


def utf8_text(name: str, data: bytes) -> str:
    """Decode ``data``, with or without a byte order mark.

    Raises:
        CalibrationError: It is not UTF-8, or holds a zero byte; names the first such byte.
    """
    if (offset := data.find(b"\0")) >= 0:  # UTF-16 without a mark is UTF-8 with a zero between all
        raise CalibrationError(
            f"{name} is not UTF-8 text: a zero byte at offset {offset}; convert it, for example "
            "with iconv"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example with iconv"
        ) from error


def _json_lines(name: str, data: bytes) -> Rows:
    return _lines(name, utf8_text(name, data))


def _lines(name: str, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{name} line {number}"
            yield place, _row(place, _parsed(place, line))


def _json(name: str, data: bytes) -> Rows:
    """Yield the objects of a list; a file of another beginning is read as JSON Lines."""
    text = utf8_text(name, data)
    if not text.lstrip().startswith("["):
        yield from _lines(name, text)
        return
    rows = _parsed(name, text)
    assert isinstance(rows, list)
    for number, row in enumerate(rows, start=1):
        place = f"{name} row {number}"
        yield place, _row(place, row)


def _csv(name: str, data: bytes) -> Rows:
    """Yield the rows after the header; every value is a text, no word of it stands for null."""
    import pyarrow  # noqa: PLC0415  # a large library that most runs do not need
    from pyarrow import csv  # noqa: PLC0415

    utf8_text(name, data)
    try:
        # A row must not be longer than a block.
        whole = csv.ReadOptions(block_size=len(data) + 1)
        lines = csv.ParseOptions(newlines_in_values=True)
        header = csv.open_csv(io.BytesIO(data), read_options=whole, parse_options=lines).schema
        texts = csv.ConvertOptions(
            column_types=dict.fromkeys(header.names, pyarrow.string()), strings_can_be_null=False
        )
        table = csv.read_csv(
            io.BytesIO(data), read_options=whole, parse_options=lines, convert_options=texts
        )
    except (pyarrow.ArrowException, ValueError) as error:
        raise CalibrationError(f"{name} cannot be read as CSV: {first_line(error)}") from error
    yield from _numbered(name, header.names, table.to_batches())


def _parquet(name: str, data: bytes) -> Rows:
    return parquet_rows(name, io.BytesIO(data))


def parquet_rows(name: str, source: Path | io.BytesIO) -> Rows:
    """Yield the rows of a Parquet file, of which one batch is in memory at a time.

    Raises:
        CalibrationError: It is damaged, or two of its columns have one name.
    """
    import pyarrow  # noqa: PLC0415  # a large library that most runs do not need
    from pyarrow import parquet  # noqa: PLC0415

    try:
        file = parquet.ParquetFile(source)
        yield from _numbered(name, file.schema_arrow.names, file.iter_batches(_BATCH_ROWS))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CalibrationError(f"{name} cannot be read as Parquet: {first_line(error)}") from error


#: How tables are read, by the ending of the file's name.
TABLES: dict[str, Callable[[str, bytes], Rows]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


def _numbered(name: str, columns: Sequence[str], batches: Iterable[object]) -> Rows:
    if len(set(columns)) < len(columns):
        raise CalibrationError(f"{name} has two columns of one name: {_listed(columns)}")
    number = 0
    for batch in batches:
        for row in batch.to_pylist():  # type: ignore[attr-defined]  # pyarrow has no types
            number += 1
            yield f"{name} row {number}", row


def _parsed(place: str, text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise CalibrationError(
            f"{place} is not JSON that can be read: nested too deeply"
        ) from error
    except ValueError as error:
        raise CalibrationError(f"{place} is not JSON: {first_line(error)}") from error


def _row(place: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise CalibrationError(
            f'{place} is not an object with its text under "{TEXT_COLUMN}", but a '
            f"{type(value).__name__}"
        )
    return value


def _chosen_column(name: str, columns: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in columns:
            raise CalibrationError(
                f"{name} has no column {shown(asked)} (--text-column): its columns are "
                f"{_listed(columns)}"
            )
        return asked
    usual = [column for column in (TEXT_COLUMN, CHAT_COLUMN) if column in columns]
    if len(usual) == 1:
        return usual[0]
    problem = "both 'text' and 'messages'" if usual else "no column 'text'"
    raise CalibrationError(
        f"{name} has {problem}: name the one to read with --text-column; its columns are "
        f"{_listed(columns)}"
    )


def _document(place: str, value: object, *, named: bool) -> Document | None:
    if value is None:
        return None
    if isinstance(value, str):
        return require_characters(place, value)
    if isinstance(value, list):
        return conversation(place, value)
    remedy = "" if named else ": name another one with --text-column"
    raise CalibrationError(f"{place} holds no text, but a {type(value).__name__}{remedy}")


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(map(str, columns)) or "none"
