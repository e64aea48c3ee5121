"""Turns the JUnit file of the GPU tests into a result: what passed, and what was skipped and why.

::

    python -m benchmarks.gpu.outcomes tests.xml --output benchmarks/results/gpu-tests.json
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import click

from benchmarks.gpu.kernel_sweep import gpu_libraries
from benchmarks.harness.machine import Machine
from sparseserve.checkpoint.tensors import write_json


@click.command()
@click.argument("report", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(report: Path, output: Path) -> None:
    """Summarise REPORT, pytest's JUnit file."""
    write_json(
        output, {"machine": {**asdict(Machine.here()), **gpu_libraries()}, **summary(report)}
    )


def summary(report: Path) -> dict[str, object]:
    """Count the outcomes of each test function, and the reasons of skips."""
    outcomes: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        function = re.sub(r"\[.*", "", case.get("name", ""))
        outcome = next(
            (kind for kind in ("failure", "error", "skipped") if kind in _tags(case)), ""
        )
        outcomes.setdefault(function, Counter())[outcome or "passed"] += 1
        for skipped in case.iter("skipped"):
            reasons[skipped.get("message", "")] += 1
    return {
        "outcomes": {name: dict(counts) for name, counts in outcomes.items()},
        "skipped": dict(reasons),
    }


def _tags(case: ElementTree.Element) -> set[str]:
    return {child.tag for child in case}


if __name__ == "__main__":
    main()
