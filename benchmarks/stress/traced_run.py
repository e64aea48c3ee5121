"""A run of the command line in a forked process, traced by strace, which can disturb it.

All modules are imported once, before the fork. strace attaches to the process before it begins,
and counts the system calls of each kind by itself; so the n-th call of a kind is the same one in
every run that is given the same work.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from sparseserve.cli import main

# Those that change files or folders, and those by which a file's bytes get to the disk.
CALLS = (
    *("write", "pwrite64", "writev", "sendfile", "copy_file_range"),
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
    *("ftruncate", "fallocate", "chmod", "fchmod", "link", "linkat", "symlink", "fsync"),
)
#: Those that fail where a disk is full.
WRITES = ("write", "pwrite64", "writev", "sendfile", "copy_file_range", "mkdir", "fallocate")
_CALL = re.compile(r"^(?P<process>\d+) +(?P<name>\w+)\((?P<rest>.*)$")


@dataclass(frozen=True, slots=True)
class Event:
    """The ``number``-th system call called ``name`` of a run, from 1; ``what`` is its line."""

    name: str
    number: int
    what: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that ended it, and what it printed."""

    code: int
    output: str


def require_strace() -> None:
    """Refuse to go on without strace.

    Raises:
        click.ClickException: It is not installed.
    """
    if shutil.which("strace") is None:
        raise click.ClickException("strace is not installed: apt install strace")


def warm_up(arguments: Sequence[str], folder: Path) -> None:
    """Run ``sparseserve`` in this process, so that forked ones find every module imported."""
    before = sys.argv
    sys.argv = ["sparseserve", *arguments]
    try:
        with (
            (folder / "output.txt").open("w") as output,
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            main()
    except SystemExit:
        pass
    finally:
        sys.argv = before


def run(arguments: Sequence[str], folder: Path) -> Ended:
    """Run ``sparseserve`` undisturbed in ``folder``."""
    process, start = _forked(arguments, folder)
    os.close(start)
    return _ended(process, folder)


def events(arguments: Sequence[str], folder: Path, below: Path) -> tuple[Ended, tuple[Event, ...]]:
    """Run ``sparseserve`` and return the system calls of its first thread that name ``below``."""
    ended, log = _traced(arguments, folder, [])
    first, counts, found = None, Counter[str](), []
    for line in log.splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        first = first or match["process"]
        if match["process"] == first:
            counts[match["name"]] += 1
            if str(below) in match["rest"]:
                event = Event(match["name"], counts[match["name"]], _shortened(match, below))
                found.append(event)
    return ended, tuple(found)


def disturbed(arguments: Sequence[str], folder: Path, event: Event, fault: str) -> Ended:
    """Run ``sparseserve`` and disturb one call by ``fault``, in strace's words."""
    inject = f"inject={event.name}:{fault}:when={event.number}"
    return _traced(arguments, folder, ["-e", inject])[0]


def killed_after(arguments: Sequence[str], folder: Path, seconds: float) -> Ended:
    """Run ``sparseserve`` and kill it at a moment, wherever it is then."""
    process = _signalled(arguments, folder, seconds, signal.SIGKILL)
    return _ended(process, folder)


def run_twice(arguments: Sequence[str], folders: Sequence[Path], seconds: float) -> list[Ended]:
    """Stop ``sparseserve`` at a moment, run it a second time, and let the first go on.

    Args:
        arguments: Of both.
        folders: Where the output of the first is kept, and that of the second.
        seconds: The moment.

    Returns:
        How each ended.
    """
    first = _signalled(arguments, folders[0], seconds, signal.SIGSTOP)
    try:
        second = run(arguments, folders[1])
    finally:
        os.kill(first, signal.SIGCONT)
    return [_ended(first, folders[0]), second]


def _signalled(arguments: Sequence[str], folder: Path, seconds: float, sign: signal.Signals) -> int:
    """Run ``sparseserve`` and send it a signal at a moment; return the process."""
    process, start = _forked(arguments, folder)
    os.close(start)
    try:
        subprocess.run(["sleep", f"{seconds:.3f}"], check=True)
    finally:
        os.kill(process, sign)
    return process


def _traced(arguments: Sequence[str], folder: Path, injection: Sequence[str]) -> tuple[Ended, str]:
    process, start = _forked(arguments, folder)
    log = folder / "strace.log"
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", str(process)]
    command += ["-e", f"trace={','.join(CALLS)}", *injection]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            os.kill(process, signal.SIGKILL)
            raise click.ClickException(f"strace cannot attach: {said.strip()}")
        os.close(start)
        ended = _ended(process, folder)
        tracer.communicate()
    return ended, log.read_text(encoding="utf-8", errors="replace")


def _forked(arguments: Sequence[str], folder: Path) -> tuple[int, int]:
    """Fork a process that runs ``sparseserve`` as soon as the returned descriptor is closed."""
    wait, start = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(start)
        _become_command(arguments, folder, wait)
    os.close(wait)
    return process, start


def _become_command(arguments: Sequence[str], folder: Path, wait: int) -> NoReturn:
    code = 70
    try:
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.read(wait, 1)
        sys.argv = ["sparseserve", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(process: int, folder: Path) -> Ended:
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return Ended(code, (folder / "output.txt").read_text(encoding="utf-8", errors="replace"))


def _shortened(match: re.Match[str], below: Path) -> str:
    """Return the call without its result, and with paths relative to ``below``."""
    call = f"{match['name']}({match['rest']}".rpartition(" = ")[0]
    return call.replace(str(below), "")[:120]
