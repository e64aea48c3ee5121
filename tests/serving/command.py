"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import subprocess
import sys


def sparseserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparseserve", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
