"""Reading text: a file, a folder, a Hugging Face dataset or the packaged default."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from sparseserve.errors import CalibrationError, first_line

TEXT_SUFFIXES = (".jsonl", ".md", ".txt")
TEXT_COLUMNS = ("text", "content")
DOCUMENT_SEPARATOR = "\n\n"
DATASET_CHARACTERS = 32_000_000


@dataclass(frozen=True, slots=True)
class TextFile:
    """One text that was read: its name and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TextSource:
    """Documents, and the files they were read from."""

    name: str
    documents: tuple[str, ...]
    files: tuple[TextFile, ...]

    def __post_init__(self) -> None:
        """Refuse a source without a word in it."""
        if not any(document.strip() for document in self.documents):
            raise CalibrationError(f"{self.name} is empty: give a text with words in it")


def read_text(
    source: str | Path | None,
    *,
    packaged: Literal["calibration", "evaluation"] = "calibration",
) -> TextSource:
    """Read a text file, a folder, a dataset or, for None, the text of the package.

    A folder gives its ``.txt``, ``.md`` and ``.jsonl`` files, at any depth, sorted by path. Each
    line of a ``.jsonl`` file is an object with its text under ``"text"``. Anything that is no path
    is a dataset: ``name``, ``name:config`` or ``name:config:split`` (split ``train`` by default),
    read as a stream and cut after DATASET_CHARACTERS, so that large corpora need not be downloaded;
    ``name`` may be a local dataset folder when a config follows it.

    Raises:
        CalibrationError: nothing is there, it is empty, or it is not UTF-8 text.
    """
    if source is None:
        return _packaged_text(packaged)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists():
        data = _read_bytes(path)
        files = (TextFile(path.name, hashlib.sha256(data).hexdigest()),)
        return TextSource(path.name, tuple(_documents(path.name, data)), files)
    if isinstance(source, Path) or _looks_like_a_path(source):
        raise CalibrationError(f"text {source} does not exist: give a file, a folder or a dataset")
    return _read_dataset(source)


def _packaged_text(packaged: Literal["calibration", "evaluation"]) -> TextSource:
    name = f"{packaged}.txt"
    data = resources.files("sparseserve").joinpath("data", name).read_bytes()
    return TextSource(
        f"packaged {name}",
        tuple(_documents(name, data)),
        (TextFile(f"sparseserve/data/{name}", hashlib.sha256(data).hexdigest()),),
    )


def _read_folder(folder: Path) -> TextSource:
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file()
    )
    if not paths:
        raise CalibrationError(f"{folder} holds no {', '.join(TEXT_SUFFIXES)} file")
    documents: list[str] = []
    files: list[TextFile] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        data = _read_bytes(path)
        documents.extend(_documents(name, data))
        files.append(TextFile(name, hashlib.sha256(data).hexdigest()))
    return TextSource(folder.name, tuple(documents), tuple(files))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"text {path} cannot be read: {error.strerror}") from error


def _documents(name: str, data: bytes) -> Iterator[str]:
    """Yield the document of a text file, or one for each line of a JSON Lines file."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it, for example with iconv"
        ) from error
    if not name.endswith(".jsonl"):
        yield text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_document(f"{name} line {number}", line)


def _json_document(place: str, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{place} is not JSON: {error}") from error
    document = record.get("text") if isinstance(record, dict) else None
    if not isinstance(document, str):
        raise CalibrationError(f'{place} is not an object with its text under "text"')
    return document


def _looks_like_a_path(source: str) -> bool:
    if Path(source.partition(":")[0]).is_dir():  # a dataset saved on this machine
        return False
    return source.startswith(("/", "./", "../", "~")) or source.endswith(TEXT_SUFFIXES)


def _read_dataset(source: str) -> TextSource:
    """Stream a dataset; its hash is over the documents that were read, joined by blank lines."""
    import datasets  # noqa: PLC0415  # takes a second to import and most runs read a file

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        documents = tuple(_first_documents(source, rows))
    except CalibrationError:
        raise
    except Exception as error:  # the library and its transports share no base class
        raise CalibrationError(
            f"text '{source}' is no file or folder and no dataset that can be loaded: "
            f"{first_line(error)}"
        ) from error
    digest = hashlib.sha256(DOCUMENT_SEPARATOR.join(documents).encode()).hexdigest()
    return TextSource(source, documents, (TextFile(source, digest),))


def _first_documents(source: str, rows: Iterable[dict[str, object]]) -> Iterator[str]:
    characters = 0
    column = None
    for row in rows:
        column = column or _text_column(source, row)
        document = str(row[column])
        yield document
        characters += len(document)
        if characters >= DATASET_CHARACTERS:
            return


def _text_column(source: str, row: dict[str, object]) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    known = [name for name in TEXT_COLUMNS if name in strings]
    if known or len(strings) == 1:
        return (known or strings)[0]
    raise CalibrationError(
        f"dataset '{source}' has no column 'text': its text columns are {', '.join(strings) or '-'}"
    )
