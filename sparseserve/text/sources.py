"""Reading text: a file, a folder, a Hugging Face dataset or the packaged default."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Literal

from sparseserve.errors import CalibrationError, first_line
from sparseserve.paths import local_path, shown
from sparseserve.text.documents import (
    DOCUMENT_SEPARATOR,
    Document,
    TextFile,
    TextSource,
)
from sparseserve.text.files import ReadLimits, beginning_of_lines, beginning_of_rows, read_file
from sparseserve.text.tables import TABLES, Rows, parquet_rows, table_documents, utf8_text

PROSE_SUFFIXES = (".md", ".txt")
TEXT_SUFFIXES = tuple(sorted((*PROSE_SUFFIXES, *TABLES)))
COMPRESSED_SUFFIXES = tuple(
    f".{ending}"
    for ending in ["7z", "br", "bz2", "gz", "lz4", "rar", "tar", "tgz", "xz", "zip", "zst"]
)

_LIMITS = ReadLimits()

logger = logging.getLogger(__name__)


def read_text(
    source: str | Path | None,
    *,
    column: str | None = None,
    prose_has_no_column: bool = False,
    packaged: Literal["calibration", "evaluation"] = "calibration",
    limits: ReadLimits = _LIMITS,
) -> TextSource:
    """Read a text file, a folder, a dataset or, for None, the text of the package.

    The ending of a file's name, in either case, says how it is read: ``.txt`` and ``.md`` are one
    document; ``.jsonl``, ``.json``, ``.csv`` and ``.parquet`` are tables with a document, or the
    list of messages of a chat, in one column. A folder gives all its files of these endings, at any
    depth, sorted by path. Anything that is no path is a dataset: ``name``, ``name:config`` or
    ``name:config:split`` (split ``train`` by default), read as a stream and cut at
    the limit, so that large corpora need not be downloaded; ``name`` may be a local dataset folder
    when a config follows it. Rows that hold null are skipped, and this is logged. Of a file or
    folder beyond the limit, and of a pipe or device, the beginning is read; this is logged, too.

    Args:
        source: What to read.
        column: Of tables and datasets; None is ``text``, or ``messages`` for chats.
        prose_has_no_column: Whether a ``column`` may be given for a text without tables.
        packaged: Which text of the package None is.
        limits: How far to read, and how long to wait.

    Raises:
        CalibrationError: nothing is there, it is empty, its ending is unknown, a column is missing
            or cannot be told, a file is not UTF-8 text, or a pipe stays silent.
    """
    if source is None:
        _require_table(f"the packaged {packaged} text", (), column, prose_has_no_column)
        return _packaged_text(packaged)
    path = local_path(source, "text", CalibrationError)
    if path.is_dir() or path.exists():
        paths = _paths_of(path) if path.is_dir() else [path]
        _require_table(str(path), [item.suffix for item in paths], column, prose_has_no_column)
        return _read_files(path, paths, column, limits)
    if isinstance(source, Path) or _looks_like_a_path(source):
        raise CalibrationError(
            f"text {shown(source)} does not exist: give a file, a folder or a dataset"
        )
    return _read_dataset(source, column, limits)


def _packaged_text(packaged: Literal["calibration", "evaluation"]) -> TextSource:
    name = f"{packaged}.txt"
    data = resources.files("sparseserve").joinpath("data", name).read_bytes()
    return TextSource(
        f"packaged {name}",
        (utf8_text(name, data),),
        (TextFile(f"sparseserve/data/{name}", hashlib.sha256(data).hexdigest()),),
    )


def _paths_of(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, sorted; say how many others there are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    for path in files:
        _refuse_compressed(path)
    if not paths:
        raise CalibrationError(f"{folder} holds no {', '.join(TEXT_SUFFIXES)} file")
    if others := sorted({path.suffix or path.name for path in set(files) - set(paths)}):
        logger.warning(
            "%s: %d files are left out, as no text ends in %s",
            folder,
            len(files) - len(paths),
            ", ".join(others[:5]),
        )
    return paths


def _read_files(
    root: Path, paths: list[Path], column: str | None, limits: ReadLimits
) -> TextSource:
    rows: list[Document | None] = []
    files: list[TextFile] = []
    for path in paths:
        if limits.whole <= 0:
            logger.warning("%s: only its first %d files are read", root, len(files))
            break
        name = path.name if path == root else path.relative_to(root).as_posix()
        if _is_long_parquet(path, limits):
            found = list(_first(parquet_rows(name, path), name, column, limits))
            logger.warning("%s: only its first %d rows are read", path, len(found))
            rows.extend(found)
            files.append(TextFile(name, _digest(found)))
            break
        data = _read_bytes(path, limits)
        limits = replace(limits, whole=limits.whole - len(data))
        rows.extend(_documents(name, path.suffix.lower(), data, column))
        files.append(TextFile(name, hashlib.sha256(data).hexdigest()))
    return _source(root.name, rows, tuple(files))


def _read_bytes(path: Path, limits: ReadLimits) -> bytes:
    suffix = path.suffix.lower()
    _refuse_compressed(path)
    if suffix not in TEXT_SUFFIXES:
        raise CalibrationError(
            f"text {path} ends in {shown(suffix) if suffix else 'nothing'}, which does not say how "
            f"to read it: known are {', '.join(TEXT_SUFFIXES)}; rename plain text to .txt"
        )
    found = read_file(path, limits)
    if found.whole:
        return found.data
    logger.warning("%s: only its first %d bytes are read", path, len(found.data))
    return _beginning(path, suffix, found.data)


def _beginning(path: Path, suffix: str, data: bytes) -> bytes:
    """Return as much of ``data``, the beginning of a file, as can be read without its end."""
    if suffix == ".parquet" or (suffix == ".json" and data.lstrip().startswith(b"[")):
        raise CalibrationError(
            f"text {path} does not end within the {len(data):,} bytes that are read of it, and a "
            f"{suffix} file cannot be read without its end: write a part of it as .jsonl"
        )
    kept = beginning_of_rows(data) if suffix == ".csv" else beginning_of_lines(data)
    if not kept:
        raise CalibrationError(f"text {path} has no whole row in its first {len(data):,} bytes")
    return kept


def _is_long_parquet(path: Path, limits: ReadLimits) -> bool:
    """Whether ``path`` can be read row by row only; where the rows are, its end says."""
    is_parquet = path.suffix.lower() == ".parquet" and path.is_file()
    return is_parquet and path.stat().st_size > limits.whole


def _refuse_compressed(path: Path) -> None:
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise CalibrationError(f"text {path} is compressed ({path.suffix}): unpack it first")


def _require_table(name: str, suffixes: Iterable[str], column: str | None, prose: bool) -> None:
    """Refuse a column of a text that has none."""
    known = [suffix.lower() for suffix in suffixes]
    if column is not None and not prose and all(suffix in PROSE_SUFFIXES for suffix in known):
        raise CalibrationError(
            f"{name} is plain text without columns: leave --text-column {column} out"
        )


def _documents(
    name: str, suffix: str, data: bytes, column: str | None
) -> Iterator[Document | None]:
    """Yield the document of a plain text, or those of a table."""
    if suffix in PROSE_SUFFIXES:
        yield utf8_text(name, data)
    else:
        yield from table_documents(name, TABLES[suffix](name, data), column)


def _source(name: str, rows: list[Document | None], files: tuple[TextFile, ...]) -> TextSource:
    """Leave out rows that hold null, and say so."""
    documents = tuple(document for document in rows if document is not None)
    skipped = len(rows) - len(documents)
    if skipped:
        logger.warning("%s: %d rows hold no text (null) and are skipped", name, skipped)
    return TextSource(name, documents, files, skipped)


def _looks_like_a_path(source: str) -> bool:
    if Path(source.partition(":")[0]).is_dir():  # a dataset saved on this machine
        return False
    endings = (*TEXT_SUFFIXES, *COMPRESSED_SUFFIXES)
    return source.startswith(("/", "./", "../", "~")) or source.lower().endswith(endings)


def _read_dataset(source: str, column: str | None, limits: ReadLimits) -> TextSource:
    """Stream a dataset; its hash is over the documents that were read, joined by blank lines."""
    import datasets  # noqa: PLC0415  # takes a second to import and most runs read a file

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        numbered = ((f"dataset '{source}' row {i}", row) for i, row in enumerate(rows, start=1))
        found = list(_first(numbered, f"dataset '{source}'", column, limits))
    except CalibrationError:
        raise
    except Exception as error:  # the library and its transports share no base class
        raise CalibrationError(
            f"text {shown(source)} is no file or folder and no dataset that can be loaded: "
            f"{first_line(error)}"
        ) from error
    return _source(source, found, (TextFile(source, _digest(found)),))


def _first(
    rows: Rows, name: str, column: str | None, limits: ReadLimits
) -> Iterator[Document | None]:
    characters = 0
    for document in table_documents(name, rows, column):
        yield document
        characters += max(1, len(str(document or "")))  # rows without text must end, too
        if characters >= limits.beginning:
            return


def _digest(documents: Iterable[Document | None]) -> str:
    """Return the hash of ``documents``, joined by blank lines."""
    read = DOCUMENT_SEPARATOR.join(str(document) for document in documents if document is not None)
    return hashlib.sha256(read.encode()).hexdigest()
