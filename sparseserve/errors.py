"""The errors a user can meet.

::

    SparseServeError
    ├── RecipeError             a recipe or option that cannot be carried out
    ├── UnsupportedModelError   a model that is missing, not a causal LM, or of unknown structure
    ├── CalibrationError        text that cannot calibrate: missing, too short, not readable
    ├── NumericalError          a non-finite or singular quantity where a finite one is needed
    ├── ArtifactError           a checkpoint that is damaged, incomplete or not what it says
    ├── ServingError            a checkpoint or machine that cannot be served as asked
    ├── ClusterError            a cluster that does not answer, or cannot do the work
    └── MissingExtraError       an optional dependency that is not installed

Every message is one line and says where, what, the value against its limit, and the remedy.
Mistakes of a calling program stay ``ValueError`` and ``TypeError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """Return ``text`` in one line, with escapes for whatever a terminal would obey."""
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


class SparseServeError(Exception):
    """Root of every error that a user, not a programmer, can cause and cure."""

    def __str__(self) -> str:
        """Return the message in one line: the names from files in it may hold anything."""
        return printable(super().__str__())


class RecipeError(SparseServeError):
    """A recipe or an option that cannot be carried out."""


class UnsupportedModelError(SparseServeError):
    """A model that is missing, is not a causal language model, or has an unknown structure."""


class CalibrationError(SparseServeError):
    """Text that cannot calibrate: missing, unreadable or too short."""


class NumericalError(SparseServeError):
    """A non-finite or singular quantity where a finite, regular one is needed."""


class ArtifactError(SparseServeError):
    """A checkpoint that is damaged, incomplete or not what it says it is."""


class ServingError(SparseServeError):
    """A checkpoint or a machine that cannot serve what was asked."""


class ClusterError(SparseServeError):
    """A cluster that does not answer, or cannot do what was asked."""


class MissingExtraError(SparseServeError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Name the missing ``package`` and the pip command that brings it."""
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'sparseserve[{extra}]'"
        )


def unknown_name(kind: str, name: str, available: Iterable[str]) -> str:
    """Return the message for a ``name`` that no table of that ``kind`` holds."""
    names = sorted(available)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" did you mean '{close[0]}'?" if close else ""
    return f"unknown {kind} '{name}':{hint} available: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, without its final stop.

    An error without a message is told by its type.
    """
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(" .:") if lines else "") or type(error).__name__
