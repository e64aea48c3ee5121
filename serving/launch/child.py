"""A child process with a log, which ends with its parent and runs no code of the current folder.

``python -m`` puts the current folder first on Python's path. A user may work in the folder of a
downloaded model, whose files must never run. So every Python here starts with ``-P``, and the
variable that means the same is handed on to the processes that vLLM starts in turn.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from sparseserve.serving.launch import tied, watcher

#: What a Python process and all its children need to leave the current folder alone.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
# What a server needs to end its engines.
_ORPHAN_SECONDS = 30
_ERROR = re.compile(r"\b(?:\w+\.)*\w*(?:Error|Exception): .+")


def python_module(module: str) -> tuple[str, ...]:
    """Return the start of a command line that runs ``module``, to be followed by its options."""
    return (sys.executable, "-P", "-m", module)


class Child:
    """A running process in a session of its own: Ctrl-C reaches the parent alone.

    When the thread that started it ends, by any cause, the system sends it a signal, and a watcher
    ends what it started in turn. So a killed parent leaves nothing behind.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        descriptors: Sequence[int] = (),
        answers: bool = False,
        log: Path | None = None,
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start ``command``.

        Args:
            command: Its first part is the path of a program.
            environment: Variables to add to this process's.
            descriptors: Open files that it inherits under the same numbers.
            answers: Whether to read its standard output, line by line, instead of logging it.
            log: File that takes its output; None is a temporary file.
            orphaned: Signal that it gets when this process ends. After any other than SIGKILL it
                has a while to end its own children.
        """
        # Writes go to the end wherever reading has moved the position that both share.
        self._log: IO[str] = (
            tempfile.TemporaryFile(mode="a+", errors="replace")  # noqa: SIM115  # closed by stop
            if log is None
            else log.open("w+", errors="replace")
        )
        self._mark = watcher.new_mark()
        patience = 0 if orphaned == signal.SIGKILL else _ORPHAN_SECONDS
        self._watcher = watcher.watch(self._mark, patience)
        self._process = subprocess.Popen(
            (*tied.command(orphaned), *command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if answers else self._log,
            stderr=self._log if answers else subprocess.STDOUT,
            text=True,
            pass_fds=tuple(descriptors),
            env={
                **os.environ,
                **SAFE_PATH,
                **(environment or {}),
                watcher.MARK_VARIABLE: self._mark,
            },
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its number, which is also that of its process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.poll()

    def answer(self) -> str:
        """Wait for a line of its standard output; empty once it has ended."""
        if self._process.stdout is None:
            raise ValueError("this child was not started with answers=True")
        return self._process.stdout.readline().strip()

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait until it ends, at most ``seconds``; return its exit code, None if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def stop(self, patience: float = 0) -> None:
        """Ask it to leave, give it ``patience`` seconds, then kill all that is left of its tree."""
        if patience:
            self._process.terminate()
            self.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        watcher.end(self._mark)
        self._watcher.kill()
        self._watcher.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def last_words(self) -> str:
        """Return the last line of the log that says anything."""
        return last_words(self._log)

    def first_error(self) -> str:
        """Return the first error in the log, or else its last line."""
        return first_error(self._log)


def last_words(log: IO[str]) -> str:
    """Return the last line of ``log`` that says anything."""
    lines = _lines(log)
    return lines[-1] if lines else "none"


def first_error(log: IO[str]) -> str:
    """Return the first error in ``log``: of processes that fall one after another, the cause.

    Where there is none it is the last line.
    """
    found = (match[0] for line in _lines(log) if (match := _ERROR.search(line)))
    return next(found, None) or last_words(log)


def _lines(log: IO[str]) -> list[str]:
    log.seek(0)
    return [line.strip() for line in log if line.strip()]
