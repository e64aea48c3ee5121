"""Paths and other values that come from outside: checked, and shown in messages."""

from __future__ import annotations

from pathlib import Path

from sparseserve.errors import SparseServeError, first_line, printable

# Of a value in a message: what is longer hides the message.
_SHOWN = 80


def shown(value: object) -> str:
    """Return ``value`` as a message shows it: in quotes, and cut where it is long."""
    text = printable(str(value))
    return f"'{text}'" if len(text) <= _SHOWN else f"'{text[:_SHOWN]}...' ({len(text)} characters)"


def shown_value(value: object) -> str:
    """Return ``value`` as Python writes it, cut where it is long."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def local_path(source: str | Path, kind: str, error: type[SparseServeError]) -> Path:
    """Return the path that ``source`` may be, with ``~`` expanded; nothing need be there.

    Args:
        source: What the user wrote.
        kind: What it should be, such as ``model``; messages begin with it.
        error: What to raise.

    Raises:
        SparseServeError: Of the type ``error``: no path of that name can be looked up, because it
            is too long, or its user or its folder is closed or unknown.
    """
    try:
        path = Path(source).expanduser()
    except RuntimeError as reason:
        raise error(f"{kind} {shown(source)}: no such user: give the whole path") from reason
    try:
        path.exists()
    except OSError as reason:
        raise error(
            f"{kind} {shown(source)} cannot be looked up: {reason.strerror or first_line(reason)}"
        ) from reason
    return path


def last_name(source: str | Path) -> str:
    """Return what a folder, or a model on the hub, is called; also of ``.`` and ``..``."""
    path = Path(source)
    return path.name if path.name not in ("", "..") else path.resolve().name


def existing_parent(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that is there."""
    whole = path.resolve()
    return next(folder for folder in (whole, *whole.parents) if folder.exists())
