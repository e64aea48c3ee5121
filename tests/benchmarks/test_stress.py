"""Runs that were killed, or that found the disk full, end in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.stress.interrupted_runs import (
    WORKS,
    Row,
    Stage,
    contents,
    interrupted_runs_table,
    problem,
)
from benchmarks.stress.traced_run import Ended
from sparseserve.checkpoint.artifact import MANIFEST_FILE
from tests.benchmarks.script_runs import table_cells

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_few_kills_and_full_disks_change_nothing() -> None:
    # In a process of its own: one that has threads should not be forked.
    command = [sys.executable, "-m", "benchmarks.stress.interrupted_runs", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["tried"] for row in rows] == [2, 1, 1]
    assert all(row["same"] == row["tried"] and row["wrong"] == [] for row in rows)
    assert [row["hit"] for row in rows[:2]] == [2, 1]
    assert rows[1]["refused"] == 1


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A command whose result is there."""
    found = Stage(WORKS[0], tmp_path).cleared()
    found.out.mkdir()
    (found.out / MANIFEST_FILE).write_text(json.dumps({"report": {"seconds": 1.5, "loss": 2}}))
    (found.out / "weights").write_bytes(b"some bytes")
    return found


def test_a_result_is_right_whatever_it_measured(stage: Stage) -> None:
    expected = contents(stage.out)
    (stage.out / MANIFEST_FILE).write_text(json.dumps({"report": {"seconds": 9.0, "loss": 2}}))
    assert problem(stage, Ended(0, ""), expected) == ""
    (stage.out / MANIFEST_FILE).write_text(json.dumps({"report": {"seconds": 1.5, "loss": 3}}))
    assert problem(stage, Ended(0, ""), expected) == "other bytes"


def test_other_bytes_remains_and_tracebacks_are_problems(stage: Stage) -> None:
    expected = contents(stage.out)
    failed = Ended(1, "Traceback (most recent call last):\nKeyError: 'x'")
    assert problem(stage, failed, expected) == "a traceback: KeyError: 'x'"
    (stage.out.parent / "other").mkdir()
    assert problem(stage, Ended(-9, ""), expected) == "other was left behind"
    (stage.out / "weights").write_bytes(b"some byteS")
    assert problem(stage, Ended(-9, ""), expected) == "other bytes"
    shutil.rmtree(stage.out)
    assert "no result" in problem(stage, Ended(0, ""), expected)


def test_the_table_counts_what_became_of_the_runs() -> None:
    row = Row(work="dense", fault="disk full", tried=9, hit=8, same=9, refused=7, wrong=())
    cells = table_cells(interrupted_runs_table, [row])
    assert cells[1] == ["dense", "disk full", "9", "8", "9", "7"]
