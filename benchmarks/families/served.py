"""What vLLM does with the packed and the dense forms of tiny models.

Several models are served by one process, because starting vLLM takes long. One that is not served
there gets a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
_TOGETHER = 8
_PATIENCE_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How vLLM serves a family.

    Attributes:
        dense: Why it does not serve the dense model; empty if it does.
        packed: Why it does not serve the packed one; likewise.
        difference: Largest difference of a log-probability of a token between the two, in float32;
            None unless both are served.
    """

    dense: str = ""
    packed: str = ""
    difference: float | None = None

    @property
    def short(self) -> str:
        """A few words for a table."""
        if self.dense:
            return "not the dense model either"
        if self.difference is None:
            return f"no: {self.packed}"
        return "yes" if self.difference <= TOLERANCE else f"differs by {self.difference:.1g}"


def serve(folders: Mapping[str, Path]) -> dict[str, Served]:
    """Serve ``packed`` and ``dense`` in each folder; return what happened by family."""
    found: dict[str, Served] = {}
    items = list(folders.items())
    for start in range(0, len(items), _TOGETHER):
        together = items[start : start + _TOGETHER]
        results = _in_one_process([folder for _, folder in together])
        results = results or [_DIED] * len(together)
        for (family, folder), result in zip(together, results, strict=True):
            # What one model leaves behind may stop the next.
            alone = len(together) > 1 and "difference" not in result
            found[family] = Served(
                **((_in_one_process([folder]) or [_DIED])[0] if alone else result)
            )
    return found


_DIED: dict[str, Any] = {"dense": "the process died or took too long"}


def _in_one_process(folders: Sequence[Path]) -> list[dict[str, Any]] | None:
    with tempfile.TemporaryDirectory() as place:
        jobs, results = Path(place) / "jobs.json", Path(place) / "results.json"
        jobs.write_text(json.dumps([str(folder) for folder in folders]))
        program = (sys.executable, "-m", "benchmarks.families.serve_forms", str(jobs), str(results))
        try:
            subprocess.run(
                program,
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                capture_output=True,
                timeout=_PATIENCE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        if not results.exists():
            return None
        found: list[dict[str, Any]] = json.loads(results.read_text())
        return found
