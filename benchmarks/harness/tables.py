"""Writes the tables of README and docs from the committed results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a result file without
``.json`` and a line of TABLES. ``python -m benchmarks.harness.tables`` rewrites them all; with
``--check`` it changes nothing and fails if one is not what its result says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.exports.onnx_model import onnx_table
from benchmarks.families.sweep import families_table
from benchmarks.gpu.tables import GPU_TABLES
from benchmarks.harness.results import RESEARCH, RESULTS, Result, read_result
from benchmarks.peers.tables import PEER_TABLES
from benchmarks.quality.budget import budget_table
from benchmarks.quality.calibration_memory import calibration_memory_table
from benchmarks.quality.compute_dtype import compute_dtype_table
from benchmarks.quality.larger_than_memory import larger_than_memory_table
from benchmarks.quality.layer_memory import layer_memory_table
from benchmarks.quality.quantised import quantised_table
from benchmarks.quality.retraining import retraining_table
from benchmarks.quality.tables import QUALITY_TABLES
from benchmarks.research.tables import RESEARCH_TABLES
from benchmarks.serving.tables import SERVING_TABLES
from benchmarks.stress.fuzzed_inputs import fuzzed_inputs_table
from benchmarks.stress.interrupted_runs import interrupted_runs_table
from benchmarks.stress.loaded_server_table import loaded_server_table

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
)
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


TABLES: dict[str, Callable[[Result], str]] = {
    **QUALITY_TABLES,
    "retraining-smollm2-2of4": retraining_table,
    "budget-smollm2-2of4": budget_table,
    "calibration-memory": calibration_memory_table,
    "compute-dtype": compute_dtype_table,
    "layer-memory": layer_memory_table,
    "larger-than-memory": larger_than_memory_table,
    "quantised-smollm2": quantised_table,
    "interrupted-runs": interrupted_runs_table,
    "fuzzed-inputs": fuzzed_inputs_table,
    "loaded-server": loaded_server_table,
    "onnx-smollm2": onnx_table,
    "families": families_table,
    **PEER_TABLES,
    **SERVING_TABLES,
    **GPU_TABLES,
    **RESEARCH_TABLES,
}


def result_file(name: str) -> Path:
    """Return the JSON that the table called ``name`` is made from."""
    return (RESEARCH if name in RESEARCH_TABLES else RESULTS) / f"{name}.json"


def render(page: str) -> str:
    """Return ``page`` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[2]
        return f"{match[1]}{TABLES[name](read_result(result_file(name)))}\n{match[3]}"

    return MARKED.sub(table, page)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is out of date.")
def main(check: bool) -> None:
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if check and before != after:
            raise click.ClickException(f"{name}: run python -m benchmarks.harness.tables")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
