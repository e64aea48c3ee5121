"""Is `import torch` slower where sparseserve is installed?

torch calls the entry points of the group ``torch.backends`` while it is imported, and one is ours.
Processes with our entry point and without (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) take turns; each
times its own import, so the start of Python does not count. What torch spends on looking for entry
points is part of the difference. ::

    python -m benchmarks.exports.torch_import
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import click

from benchmarks.harness.results import RESULTS, write_result

TIMED = (
    "import time; started = time.perf_counter(); import torch; print(time.perf_counter() - started)"
)
OURS = (
    "import time, torch; started = time.perf_counter(); "
    "from sparseserve.huggingface.autoload import register; register(); "
    "print(time.perf_counter() - started)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians over the turns, in milliseconds; ``ours`` is what our entry point itself takes."""

    turns: int
    with_entry_points: float
    without: float
    ours: float


def seconds(program: str, autoload: str) -> float:
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@click.command()
@click.option("--turns", default=25, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=RESULTS / "torch-import.json"
)
def main(turns: int, output: Path) -> None:
    programs = ((TIMED, "1"), (TIMED, "0"), (OURS, "0"))
    times = [[seconds(*program) for program in programs] for _ in range(turns)]
    medians = (round(1000 * median(column), 2) for column in zip(*times, strict=True))
    row = Row(
        turns=turns, **dict(zip(("with_entry_points", "without", "ours"), medians, strict=True))
    )
    click.echo(asdict(row))
    write_result(output, {"turns": turns}, rows=[row])


if __name__ == "__main__":
    main()
