"""Running a benchmark's script and reading a table that it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner


def smoke_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``script`` with ``--smoke``; fail if it writes a result or measures nothing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a smoke run wrote a result")

    monkeypatch.setattr(script, "write_result", refuse)
    run = CliRunner().invoke(script.main, ["--smoke"], catch_exceptions=False)
    assert run.exit_code == 0
    assert "error" in run.output or "peak_memory_bytes" in run.output


def table_cells(
    table: Callable[[dict[str, Any]], str], rows: Iterable[object], /, **setting: object
) -> list[list[str]]:
    """Return the cells of a table made from ``rows``, without its rules."""
    machine = dict.fromkeys(("cpu", "threads", "torch", "commit", "date"), "")
    data = [asdict(row) for row in rows]  # type: ignore[call-overload]  # rows are dataclasses
    result = {"machine": machine, "setting": setting, "rows": data}
    lines = table(json.loads(json.dumps(result))).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert len({len(line) for line in cells}) <= 2  # tables of two widths at most
    return cells
