"""The bytes of a text file: all of them, or the beginning of what is too long or never ends.

A pipe, a device and a file of terabytes are read as far as windows need, and no further. A pipe
whose writer is silent is given up.
"""

from __future__ import annotations

import codecs
import os
import select
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from sparseserve.errors import CalibrationError

_AT_ONCE = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How far a text is read, and how long is waited for it.

    Attributes:
        whole: Files up to so many bytes are read whole, and folders up to so many in all.
        beginning: Bytes that are read of a longer file, or of a pipe or device; of data sets,
            characters. The default is millions of tokens.
        silence: Seconds to wait for the next byte of a pipe or device.
        seconds: To wait for its end, or for ``beginning`` bytes of it.
    """

    whole: int = 2**30
    beginning: int = 32_000_000
    silence: float = 60
    seconds: float = 600


@dataclass(frozen=True, slots=True)
class FileBytes:
    """What was read of a file; ``whole`` says whether that is all."""

    data: bytes
    whole: bool


def read_file(path: Path, limits: ReadLimits) -> FileBytes:
    """Read a file, or the beginning of one that is too long or has no end.

    Args:
        path: A file, a pipe or a device.
        limits: How far, and how long to wait.

    Raises:
        CalibrationError: It cannot be opened or read, or a pipe or device is too slow.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return _from_pipe(descriptor, path, limits)
            if found.st_size <= limits.whole:
                return FileBytes(file.read(), True)
            return FileBytes(file.read(limits.beginning), False)
    except OSError as error:
        raise CalibrationError(f"text {path} cannot be read: {error.strerror}") from error


def beginning_of_lines(data: bytes) -> bytes:
    """Return ``data``, which was cut anywhere, up to the end of its last whole line.

    Where a line is longer than that, the last whole character is the end. Bytes that are no text
    stay, for whoever decodes them to refuse.
    """
    if end := data.rfind(b"\n") + 1:
        return data[:end]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return data
    cut_off, _ = decoder.getstate()
    return data.removesuffix(cut_off)


def beginning_of_rows(data: bytes) -> bytes:
    """Return CSV ``data``, which was cut anywhere, up to the end of its last whole row.

    A row ends at the end of a line before which all quotes are closed.
    """
    end = len(data)
    quotes = data.count(b'"')
    while (newline := data.rfind(b"\n", 0, end)) >= 0:
        quotes -= data.count(b'"', newline, end)
        if quotes % 2 == 0:
            return data[: newline + 1]
        end = newline
    return b""


def _from_pipe(descriptor: int, path: Path, limits: ReadLimits) -> FileBytes:
    data = bytearray()
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + limits.seconds
    while len(data) < limits.beginning:
        left = max(0.0, deadline - time.monotonic())
        if not waiting.poll(1000 * min(limits.silence, left)) or not left:
            limit = limits.silence if left > limits.silence else limits.seconds
            raise CalibrationError(
                f"text {path} gave {len(data):,} bytes, and then neither more nor its end within "
                f"{limit:g} s: write its text into a file"
            )
        piece = os.read(descriptor, min(_AT_ONCE, limits.beginning - len(data)))
        if not piece:
            return FileBytes(bytes(data), True)
        data += piece
    return FileBytes(bytes(data), False)
