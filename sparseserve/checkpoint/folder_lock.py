"""A lock on a folder that a process writes into; the system releases it with the process."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseserve.checkpoint.tensors import writing
from sparseserve.errors import ArtifactError

LOCK_FILE = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which is made where it is missing, while the block runs.

    Raises:
        ArtifactError: Another process holds it, or the folder cannot be written; the message names
            the process.
    """
    descriptor = _lock(folder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def refuse_locked(folder: Path) -> None:
    """Refuse a ``folder`` that another process works in, and leave no trace.

    Raises:
        ArtifactError: Names the process.
    """
    path = folder / LOCK_FILE
    if not path.is_file():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held(folder) from error


def _lock(folder: Path) -> int:
    """Return an open descriptor that holds the lock of ``folder``."""
    path = folder / LOCK_FILE
    while True:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # the process that held it has just finished and removed the folder
        try:
            with writing(path):
                _flock(descriptor, folder)
        except ArtifactError:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # that file was removed between the two calls: try the new one


def _flock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _held(folder) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _held(folder: Path) -> ArtifactError:
    who, _, host = (folder / LOCK_FILE).read_text(encoding="utf-8").strip().partition(" ")
    process = f"process {who}" if who else "a process that is just starting"
    where = f" on {host}" if host and host != socket.gethostname() else ""
    return ArtifactError(
        f"{folder}: another process ({process}{where}) is working in it: wait for it or stop it, "
        "or choose another output folder"
    )
