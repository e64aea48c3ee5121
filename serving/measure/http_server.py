"""``vllm serve`` in a process group of its own, up for as long as a ``with`` block runs."""

from __future__ import annotations

import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sparseserve.errors import ServingError
from sparseserve.serving.launch.child import Child
from sparseserve.serving.launch.command import LOCAL_HOST, server_command

_START_SECONDS = 1800
_STOP_SECONDS = 30
_POLL_SECONDS = 0.5


class HttpServer:
    """A running server.

    Attributes:
        folder: What it serves.
        port: Where it listens, on the loopback interface only.
    """

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        """Start to serve ``folder`` on a free port, as ``sparseserve serve`` would.

        Args:
            folder: The checkpoint.
            options: For ``vllm serve``.

        Raises:
            ServingError: The folder or the installation cannot be served.
            MissingExtraError: vLLM is not installed.
        """
        self.folder = folder
        self.port = _free_port()
        address = ("--host", LOCAL_HOST, "--port", str(self.port))
        command = server_command(folder, (*address, *options))
        self._process = Child(
            command.arguments,
            environment=command.environment,
            # vLLM's server ends its engine when it is asked to leave.
            orphaned=signal.SIGTERM,
        )

    def __enter__(self) -> Self:
        """Wait until the server answers.

        Raises:
            ServingError: It does not come up; carries its own reason.
        """
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask the server to leave; then end whatever of it is left."""
        self._process.stop(_STOP_SECONDS)

    def require_running(self) -> None:
        """Refuse to go on with a server that has ended.

        Raises:
            ServingError: Carries the server's reason.
        """
        if (code := self._process.exit_code) is not None:
            raise ServingError(
                f"{self.folder}: the vLLM server ended with exit code {code}: "
                f"{self._process.first_error()}"
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            self.require_running()
            if time.monotonic() > deadline:
                raise ServingError(
                    f"{self.folder}: the vLLM server was not ready after {_START_SECONDS} s; "
                    f"its log says: {self._process.first_error()}"
                )
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{LOCAL_HOST}:{self.port}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL_HOST, 0))
        port: int = probe.getsockname()[1]
    return port
