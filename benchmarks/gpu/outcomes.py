"""Turns the JUnit file of the GPU tests into a result: what passed, and what was skipped and why.

::

    python -m benchmarks.gpu.outcomes tests.xml --output benchmarks/results/gpu-tests.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.gpu.kernel_sweep import gpu_libraries
from benchmarks.harness.machine import Machine
from benchmarks.harness.outcomes import counts, read_cases, skip_reasons
from sparseserve.checkpoint.tensors import write_json


@click.command()
@click.argument("report", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(report: Path, output: Path) -> None:
    """Summarise REPORT, pytest's JUnit file."""
    cases = read_cases(report)
    write_json(
        output,
        {
            "machine": {**asdict(Machine.here()), **gpu_libraries()},
            "outcomes": counts(cases, lambda case: case.function),
            "skipped": skip_reasons(cases),
        },
    )


if __name__ == "__main__":
    main()
