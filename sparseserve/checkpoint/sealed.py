"""JSON files with a hash of themselves: what a resumed run takes back is what was stored."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sparseserve.checkpoint.tensors import write_json


def write_sealed(path: Path, data: object) -> None:
    """Write JSON ``data`` and its sha256, whole or not at all.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    plain = json.loads(json.dumps(data))
    write_json(path, {"sha256": _digest(plain), "data": plain})


def read_sealed(path: Path) -> object | None:
    """Return what ``write_sealed`` wrote; None if the file is missing or was changed since."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # missing or damaged: the caller makes it again
    if not isinstance(stored, dict) or set(stored) != {"sha256", "data"}:
        return None
    data: object = stored["data"]
    return data if stored["sha256"] == _digest(data) else None


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
