"""Become a program that ends with the process that started it.

Run as a file of its own between the two, because the request must be made by the process that is
to end, and must be made before the program starts.
"""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def command(orphaned: signal.Signals) -> tuple[str, ...]:
    """Return what to put before a command line to tie it to this process.

    Args:
        orphaned: The signal that the program gets when this process ends.
    """
    # Isolated and without site-packages: it starts in hundredths of a second.
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(orphaned)))


def main(parent: int, number: int, program: list[str]) -> int:
    """Tie this process to ``parent`` and become ``program``; return only if the parent is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, number):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        return 1
    os.execv(program[0], program)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
