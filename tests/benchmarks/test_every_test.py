"""`make test-all` finds Pythons, counts what came of the tests, and names what failed."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.harness import every_test
from benchmarks.harness.every_test import EveryTestError, PythonRun, interpreter, run_tests
from benchmarks.harness.outcomes import Case

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_python_is_found_on_the_path(tmp_path: Path) -> None:
    found = tmp_path / f"python{THIS}"
    found.symlink_to(sys.executable)
    assert interpreter(THIS, str(tmp_path)) == found


def test_a_program_that_only_has_the_name_is_not_taken(tmp_path: Path) -> None:
    program(tmp_path / "python3.12", "echo 'not chosen' >&2; exit 127")
    program(tmp_path / "python3.13", "echo Python 3.1.5")
    assert interpreter("3.12", str(tmp_path)) is None
    assert interpreter("3.13", str(tmp_path)) is None


def test_the_versions_that_pyenv_holds_are_found_behind_its_stand_ins(tmp_path: Path) -> None:
    program(tmp_path / "shims" / "python3.12", "exit 127")
    real = program(tmp_path / "versions" / "3.12.1" / "bin" / "python3.12", "echo Python 3.12.1")
    assert interpreter("3.12", os.pathsep.join([str(tmp_path / "shims"), "/nowhere"])) == real


@pytest.fixture
def own_tests(tmp_path: Path) -> Path:
    """Return a file with one test of each outcome, one of which the gate leaves out."""
    path = tmp_path / "test_own.py"
    path.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.research\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_settled(n): assert n == 1\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_erring(broken): pass\n"
        "def test_elsewhere(): pytest.skip('no such machine')\n"
    )
    return path


def test_every_case_is_run_and_what_failed_is_named(own_tests: Path) -> None:
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "", str(own_tests)]
    run = run_tests(Path(sys.executable), arguments)
    assert run.totals == {"passed": 2, "failure": 1, "error": 1, "skipped": 1}
    assert [name.rpartition("::")[2] for name in run.failed] == ["test_settled[2]", "test_erring"]
    assert [reason.rpartition(": ")[2] for reason in run.skipped] == ["no such machine"]
    assert run.python.startswith(THIS)
    assert run.packages["torch"]


def test_a_run_without_tests_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "test_empty.py"
    empty.write_text("")
    with pytest.raises(EveryTestError, match="code 5 and ran no test"):
        run_tests(Path(sys.executable), ["-q", "-p", "no:cacheprovider", str(empty)])


def test_outcomes_are_by_file() -> None:
    cases = [Case("a", "x", "passed"), Case("b", "y[1]", "failure"), Case("a", "z", "passed")]
    run = PythonRun.of("3.11.0", {}, 1.0, cases)
    assert run.outcomes == {"a": {"passed": 2}, "b": {"failure": 1}}
    assert run.failed == ("b::y[1]",)


def test_what_the_gate_leaves_out_is_not_left_out_here() -> None:
    arguments = every_test.PYTEST
    assert arguments[arguments.index("-m") + 1] == ""


def test_a_version_that_cannot_be_installed_is_named_and_the_others_run(
    own_tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment(python: Path, version: str) -> Path:
        if version == "3.12":
            raise EveryTestError("no packages")
        return python

    run = every_test.run_tests
    monkeypatch.setattr(every_test, "environment", environment)
    monkeypatch.setattr(every_test, "interpreter", lambda version: Path(sys.executable))
    monkeypatch.setattr(every_test, "run_tests", lambda python: run(python, (str(own_tests), "-q")))
    arguments = ["--version", "3.11", "--version", "3.12", "-o", str(tmp_path / "result.json")]
    done = CliRunner().invoke(every_test.main, arguments)
    assert done.exit_code == 1  # a case of own_tests fails
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["setting"]["not_installed"] == ["3.12"]
    assert len(result["runs"]) == 1
