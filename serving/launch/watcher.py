"""A small process that ends what a killed process leaves behind.

The signal of ``tied`` reaches a child alone. vLLM starts processes of its own, in turn, and a
killed server does not take them along. So every process of such a tree carries a mark in its
environment, which children inherit whatever group or session they move to. The watcher waits for
the end of the process that started it; then it gives the marked ones time to leave, and kills the
rest.

Run as a file of its own, isolated, so that it starts at once and needs little memory.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

#: The variable that holds the mark of a tree.
MARK_VARIABLE = "SPARSESERVE_TREE"
_LOOK_SECONDS = 2.0
_POLL_SECONDS = 0.1


def new_mark() -> str:
    """Return a mark that no other tree has."""
    return f"{os.getpid()}-{os.urandom(8).hex()}"


def watch(mark: str, patience: float) -> subprocess.Popen[bytes]:
    """Start a watcher of this process, and of whatever it becomes.

    Args:
        mark: Of the processes to end after it.
        patience: Seconds that they get to leave by themselves.
    """
    environment = {key: value for key, value in os.environ.items() if key != MARK_VARIABLE}
    return subprocess.Popen(
        (sys.executable, "-I", "-S", __file__, str(os.getpid()), mark, str(patience)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


def marked(mark: str) -> list[int]:
    """Return the processes of this user that carry ``mark``."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # Processes come and go, and those of others cannot be read.
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                found.append(int(name))
    return found


def end(mark: str) -> None:
    """Kill the processes that carry ``mark``, and those that they start meanwhile."""
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def main(parent: int, mark: str, patience: float) -> None:
    """Wait for the end of ``parent``, then for that of the marked processes; kill who stays."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    deadline = time.monotonic() + patience
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    end(mark)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
