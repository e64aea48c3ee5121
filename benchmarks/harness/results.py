"""Where committed results lie, how they are written, and how a benchmark goes on with its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.machine import Machine
from sparseserve.checkpoint.tensors import write_json
from sparseserve.errors import SparseServeError

RESULTS = Path(__file__).parents[1] / "results"
RESEARCH = RESULTS / "research"

Result = dict[str, Any]
"""A result as its JSON has it."""


class OtherSettingError(SparseServeError, click.ClickException):
    """A result file holds measurements of another setting; a command ends with its one line."""


def write_result(path: Path, setting: object, **parts: object) -> None:
    """Write a result: what was measured, on which machine, and the measurements.

    Args:
        path: Of the JSON.
        setting: What is the same for all measurements, a dataclass or a mapping.
        parts: The measurements by name; dataclasses, or lists of them, become objects.
    """
    plain = {name: _plain(part) for name, part in parts.items()}
    write_json(path, {"setting": _plain(setting), "machine": asdict(Machine.here()), **plain})


def read_result(path: Path) -> Result:
    """Read what :func:`write_result` wrote."""
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def stored(path: Path, setting: object, part: str = "runs") -> list[dict[str, Any]]:
    """Return the measurements that ``path`` already holds, none where there is no such file.

    Args:
        path: Of the JSON.
        setting: What the new measurements will have in common, a dataclass or a mapping.
        part: The name of the measurements.

    Raises:
        OtherSettingError: They were made with another setting, so both cannot share a file.
    """
    if not path.exists():
        return []
    result = read_result(path)
    # A tuple comes back from JSON as a list.
    wanted, there = json.loads(json.dumps(_plain(setting))), result["setting"]
    if there != wanted:
        name = next(key for key in {**wanted, **there} if there.get(key) != wanted.get(key))
        raise OtherSettingError(
            f"{path} was measured with another setting ({name} {there.get(name)!r} there, "
            f"{wanted.get(name)!r} here): choose another --result or move the file away"
        )
    found: list[dict[str, Any]] = result[part]
    return found


def _plain(value: object) -> object:
    """Return ``value`` with dataclasses as dictionaries."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
