"""Setting up finds PyTorch's CPU build by pip or by uv, and says what to do where neither can.

The programs that download are stand-ins: they write down what they were asked, and fail where a
test says so.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / ".ci" / "install"
STAND_IN = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  {failing}) exit 1 ;;
esac
"""
NOTHING = "nothing-fails"
PROJECT = ".[serve-cpu,dev]"
BY_PIP = f"-m pip install --no-compile --editable {PROJECT}"
GET_UV = "-m pip install uv"
CLEAN = "-m pip uninstall --yes torchvision torchaudio torchcodec"


def by_uv(environment: Path) -> str:
    python = environment / "bin" / "python"
    return f"-m uv pip install --python {python} --torch-backend=cpu --editable {PROJECT}"


def install(environment: Path, failing: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Install with a stand-in for Python whose ``failing`` calls fail; return what it was asked."""
    python, log = environment / "bin" / "python", environment / "log"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(log=log, failing=failing), encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        [str(INSTALL), str(environment), "serve-cpu,dev"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text(encoding="utf-8").splitlines()


def test_where_pip_finds_all_uv_is_not_asked(tmp_path: Path) -> None:
    done, asked = install(tmp_path, NOTHING)
    assert done.returncode == 0
    assert asked == [BY_PIP, CLEAN]


def test_where_pip_does_not_find_the_cpu_build_uv_does(tmp_path: Path) -> None:
    done, asked = install(tmp_path, "'-m pip install --no-compile --editable'*")
    assert done.returncode == 0
    assert asked == [BY_PIP, GET_UV, by_uv(tmp_path), CLEAN]


@pytest.mark.parametrize("failing", ["'-m pip install'*", "*--editable*"], ids=["uv", "both"])
def test_where_neither_does_the_remedy_is_named(tmp_path: Path, failing: str) -> None:
    done, asked = install(tmp_path, failing)
    assert done.returncode == 1
    assert CLEAN not in asked
    last = done.stderr.splitlines()[-1]
    assert last.startswith("neither pip nor uv could install .[serve-cpu,dev]")
    assert "set PIP_EXTRA_INDEX_URL" in last


def test_without_arguments_it_explains_itself() -> None:
    done = subprocess.run([str(INSTALL)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert ".ci/install .venv serve-cpu,demo,dev" in done.stderr
