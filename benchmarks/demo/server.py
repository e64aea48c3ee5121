"""A server's command, run for as long as a block needs it."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from sparseserve.errors import SparseServeError
from sparseserve.serving.launch.child import Child

START_SECONDS = 300
STOP_SECONDS = 30


class ServerError(SparseServeError, click.ClickException):
    """The server did not come up; a command ends with its one line."""


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run ``command`` and yield the address at which it answers, once it does.

    Raises:
        ServerError: It ended, or did not answer in time.
    """
    process = Child(command, log=log, environment=environment, orphaned=signal.SIGTERM)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{url}/health", process, log)
        yield url
    finally:
        process.stop(STOP_SECONDS)


def _wait_until_ready(url: str, process: Child, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    click.echo(f"waiting for vLLM (its output goes to {log})", err=True)
    while time.monotonic() < deadline:
        if process.exit_code is not None:
            raise ServerError(f"vLLM ended with exit code {process.exit_code}: see {log}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise ServerError(f"vLLM was not ready after {START_SECONDS} s: see {log}")
