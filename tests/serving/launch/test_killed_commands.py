"""A command that is killed leaves no engine behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from sparseserve.serving.launch.watcher import MARK_VARIABLE

_OURS = "TEST_TREE"


def tree_of(mark: str) -> dict[int, bool]:
    """The processes that inherited ``mark``, and whether each was started to be watched over."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{_OURS}={mark}".encode() in variables:
                watched = any(item.startswith(f"{MARK_VARIABLE}=".encode()) for item in variables)
                found[int(folder.name)] = watched
    return found


@pytest.mark.vllm
@pytest.mark.further
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "DENSE", "--", "--max-model-len", "64", "--port", "0"],
        ["tune", "PACKED", "--again"],
        ["bench", "PACKED", "--baseline", "DENSE", "--samples", "1", "--sequence-length", "16"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_process_outlives_a_killed_command(
    pair: tuple[Path, Path], tmp_path: Path, arguments: list[str]
) -> None:
    pytest.importorskip("vllm")
    names = {"PACKED": str(pair[0]), "DENSE": str(pair[1])}
    mark = uuid.uuid4().hex
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(
            [sys.executable, "-P", "-m", "sparseserve", *(names.get(it, it) for it in arguments)],
            env={**os.environ, _OURS: mark},
            stdout=log,
            stderr=log,
        )
        # A server or worker that has started engines of its own, or an engine at work.
        while sum(tree_of(mark).values()) < (1 if arguments[0] == "bench" else 2):
            assert command.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        time.sleep(5)
        command.kill()
        command.wait()
    while tree_of(mark):
        time.sleep(0.2)
