"""Killed runs and full disks change no byte, and damaged inputs are refused or read aright."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.stress.fuzz_kinds import KINDS
from benchmarks.stress.fuzzed_inputs import Row as FuzzedRow
from benchmarks.stress.fuzzed_inputs import fuzzed_inputs_table
from benchmarks.stress.guarded import ACCEPTED, FAILED, REFUSED
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
    assert [row["tried"] for row in rows] == [2, 1, 1, 1, 1]
    assert all(row["same"] == row["tried"] and row["wrong"] == [] for row in rows)
    assert [row["hit"] for row in rows[:3]] == [2, 1, 1]
    assert [row["refused"] for row in rows[1:3]] == [1, 1]


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


def test_a_few_damaged_inputs_of_each_kind_are_refused_or_read_aright() -> None:
    command = [sys.executable, "-m", "benchmarks.stress.fuzzed_inputs", "--smoke"]
    done = subprocess.run(
        [*command, "--inputs", "200"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in rows] == [kind.name for kind in KINDS]
    for row in rows:
        assert row["failed"] == 0, row
        assert row["accepted"] + row["refused"] == row["inputs"] > 0
    # Of so few inputs of a kind, all may be refused.
    assert sum(row["accepted"] for row in rows) > 0


# In a process of its own, like the script: this one may have threads, and must not be forked.
_BAD_ATTEMPTS = """
import os, sys, json, pathlib
from benchmarks.stress.guarded import endings
from sparseserve.errors import ArtifactError

def attempt(folder, chance):
    number = int((folder / "number").read_text()) if (folder / "number").exists() else 0
    (folder / "number").write_text(str(number + 1))
    (lambda: None, refuse, answer_wrongly, crash, too_much, hang, die, lambda: None)[number]()

class WrongAnswerError(Exception): pass
def refuse(): raise ArtifactError("no")
def answer_wrongly(): raise WrongAnswerError("other values")
def crash(): {}["x"]
def too_much(): raise ArtifactError("a" * 2000)
def hang():
    while True: pass
def die(): os.abort()

for ending in endings(attempt, pathlib.Path(sys.argv[1]), range(8), "seed", 2.0):
    print(json.dumps([ending.number, ending.how, ending.why]))
"""


def test_an_attempt_that_hangs_dies_or_answers_wrongly_is_a_fault(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BAD_ATTEMPTS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [number for number, _, _ in found] == list(range(8)), done.stderr
    assert [how for _, how, _ in found] == [ACCEPTED, REFUSED, *([FAILED] * 5), ACCEPTED]
    reasons = (
        "other values",
        "KeyError",
        "a refusal of 2000",
        "no answer within 2 s",
        "died with -6",
    )
    for (_, _, why), reason in zip(found[2:7], reasons, strict=True):
        assert reason in why


def test_the_table_counts_what_became_of_damaged_inputs() -> None:
    row = FuzzedRow(kind="texts", inputs=1000, accepted=1, refused=998, failed=1, faults=("7: x",))
    cells = table_cells(fuzzed_inputs_table, [row], seed=0, seconds=60.0)
    assert cells[1] == ["texts", "1,000", "1", "998", "1"]
    assert cells[2][0] == "together"
