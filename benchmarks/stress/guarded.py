"""Attempts in a process of their own, which may hang, die or fill the memory without harm."""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sparseserve.errors import SparseServeError

#: How an attempt may end, well or badly.
ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"
_LONGEST_LINE = 1000
# Of memory, beyond which an attempt fails; two orders above what any input of the corpus needs.
_MEMORY_BYTES = 4 * 2**30

Attempt = Callable[[Path, random.Random], None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How the attempt at input ``number`` ended, and why."""

    number: int
    how: str
    why: str = ""


def endings(
    attempt: Attempt, folder: Path, numbers: range, seed: str, seconds: float
) -> Iterator[Ending]:
    """Make an attempt for each of ``numbers``, in forked processes.

    Args:
        attempt: What is tried; see ``fuzz_kinds``.
        folder: With the corpus.
        numbers: Of the inputs; with ``seed`` each decides the damage.
        seed: Of the kind.
        seconds: Longest time of an attempt.
    """
    number = numbers.start
    while number < numbers.stop:
        process, replies = _forked(attempt, folder, range(number, numbers.stop), seed)
        with os.fdopen(replies, "rb", buffering=0) as file:
            for line in _lines(file.fileno(), seconds):
                yield Ending(number, *json.loads(line))
                number += 1
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status)
        if number < numbers.stop:
            why = (
                f"no answer within {seconds:g} s"
                if code == -signal.SIGKILL
                else f"died with {code}"
            )
            yield Ending(number, FAILED, why)
            number += 1


def tried(attempt: Attempt, folder: Path, number: int, seed: str) -> tuple[str, str]:
    """Make one attempt in this process, and say how it ended."""
    try:
        attempt(folder, random.Random(f"{seed} {number}"))
    except SparseServeError as error:
        line = str(error)
        if "\n" in line or len(line) > _LONGEST_LINE:
            return FAILED, f"a refusal of {len(line)} characters: {line[:200]!r}"
        return REFUSED, type(error).__name__
    except Exception as error:  # whatever is no refusal is a fault
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return FAILED, f"{type(error).__name__} at {where}: {str(error)[:200]}"
    return ACCEPTED, ""


def _forked(attempt: Attempt, folder: Path, numbers: range, seed: str) -> tuple[int, int]:
    replies, end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(replies)
        _answer_all(attempt, folder, numbers, seed, end)
    os.close(end)
    return process, replies


def _answer_all(attempt: Attempt, folder: Path, numbers: range, seed: str, end: int) -> NoReturn:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        warnings.simplefilter("ignore")
        for number in numbers:
            answer = json.dumps(tried(attempt, folder, number, seed)).encode()
            os.write(end, answer + b"\n")
        code = 0
    finally:
        os._exit(code)


def _lines(descriptor: int, seconds: float) -> Iterator[bytes]:
    """Yield the lines that arrive, each within ``seconds``; end where none does."""
    waiting, rest = select.poll(), b""
    waiting.register(descriptor, select.POLLIN)
    while waiting.poll(1000 * seconds):
        piece = os.read(descriptor, 2**16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
