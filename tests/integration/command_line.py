"""What the command line is given and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Done]


def prune_arguments(model: Path, text: Path, *more: object) -> list[object]:
    short = ["--samples", 2, "--sequence-length", 32, "--calibration", text]
    return ["prune-and-export", model, *short, *more]


def refusal(done: Done) -> str:
    """The one line of an error; progress lines may stand before it."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]
