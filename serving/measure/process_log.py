"""What a process that failed said last."""

from __future__ import annotations

import re
from typing import IO

_ERROR = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): .+")


def last_words(log: IO[str]) -> str:
    """Return the last line of ``log`` that says anything."""
    lines = _lines(log)
    return lines[-1] if lines else "none"


def first_error(log: IO[str]) -> str:
    """Return the first error in ``log``: of processes that fall one after another, the cause.

    Where there is none it is the last line.
    """
    found = (match[0] for line in _lines(log) if (match := _ERROR.search(line)))
    return next(found, None) or last_words(log)


def _lines(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line.strip() for line in log if line.strip()]
