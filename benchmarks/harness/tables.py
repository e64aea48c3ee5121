"""Writes the tables of README and docs from the committed results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a result file without
``.json`` and a line of TABLES. ``python -m benchmarks.harness.tables`` rewrites them all; with
``--check`` it changes nothing and fails if one is not what its result says.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu.tables import GPU_TABLES
from benchmarks.peers.timing import timing_table
from benchmarks.quality.budget import budget_table
from benchmarks.quality.compare import RESULTS, default_variant
from benchmarks.quality.evidence_tables import EVIDENCE_TABLES
from benchmarks.quality.retraining import retraining_table
from benchmarks.quality.tables import (
    DENSE,
    by_variant,
    label,
    patterns_table,
    perplexities,
    quality_table,
    sizes_table,
)
from benchmarks.serving.tables import SERVING_TABLES

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/method.md", "docs/serving.md", "docs/evidence.md", "docs/gpu.md")
OURS = "sparseserve"
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def operators_table(result: dict[str, Any]) -> str:
    """Relative output error of one operator by method."""
    patterns = list(dict.fromkeys(row["pattern"] for row in result["rows"]))
    heads = [f"{pattern} {kind}" for pattern in patterns for kind in ("calibration", "held-out")]
    lines = [
        f"| method | {' | '.join(heads)} | products with G |",
        "|---|" + "---|" * (len(heads) + 1),
    ]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["method"] == method]
        errors = [row[key] for row in rows for key in ("calibration_error", "heldout_error")]
        cells = " | ".join(f"{error:.4f}" for error in errors)
        lines.append(f"| {method} | {cells} | {rows[0]['gram_products']} |")
    machine = result["machine"]
    lines.append(f"\nCommit {machine['commit']}, torch {machine['torch']}, {machine['date']}.")
    return "\n".join(lines)


def peers_table(result: dict[str, Any]) -> str:
    """Perplexity by tool and method, ours of the same methods and setting among them."""
    setting = result["setting"]
    texts = list(setting["texts"])
    lines = [
        f"| tool | method | {' | '.join(f'perplexity, {text}' for text in texts)} "
        "| kept weights changed |",
        "|---|---|" + "---|" * (len(texts) + 1),
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        tool = f"{run['worker']['tool']} {run['worker']['version']}"
        groups.setdefault((tool, run["worker"]["method"]), []).append(run)
    for (tool, method), runs in groups.items():
        changed = f"{statistics.fmean(run['changed_weights'] for run in runs):.0%}"
        lines.append(f"| {tool} | {method} | {perplexities(runs, texts)} | {changed} |")
    ours = _our_runs(result, {method for _, method in groups})
    for variant, runs in ours.items():
        tool, name = ("", "the dense model") if variant == DENSE else (OURS, label(variant))
        lines.append(f"| {tool} | {name} | {perplexities(runs, texts)} | |")
    for variant in [variant for variant in ours if _is_default_pruning(variant)]:
        for (tool, method), others in groups.items():
            shares = _gap_shares(ours[variant], others, ours[DENSE][0], texts)
            name = f"gap of {label(variant)} / {tool.split()[0]} {method}"
            lines.append(f"| | {name} | {shares} | |")
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, the same "
        f"{setting['samples'] * setting['sequence_length']:,} calibration tokens a seed for all "
        f"(mean, lowest to highest over seeds; one seed where one figure stands); evaluated alike; "
        f"the other tools' runs by commit {result['machine']['commit']}, "
        f"{result['machine']['date']}."
    )
    return "\n".join(lines)


def _gap_shares(
    runs: list[dict[str, Any]],
    others: list[dict[str, Any]],
    dense: dict[str, Any],
    texts: list[str],
) -> str:
    """What of the others' gap is left, over the seeds that both have been run with.

    A gap is ln(perplexity / dense perplexity).
    """
    common = {run["seed"] for run in runs} & {run["seed"] for run in others}
    runs, others = ([run for run in each if run["seed"] in common] for each in (runs, others))

    def gap(found: list[dict[str, Any]], text: str) -> float:
        base = dense["perplexity"][text]
        return statistics.fmean(math.log(run["perplexity"][text] / base) for run in found)

    return " | ".join(f"{gap(runs, text) / gap(others, text):.2f}" for text in texts)


def _our_runs(result: dict[str, Any], methods: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Our runs of ``methods`` and of the default recipe, whichever steps follow, by variant.

    They are taken from a result of the same setting.
    """
    if not result["ours"]:
        return {}
    ours = json.loads((RESULTS / result["ours"]).read_text(encoding="utf-8"))
    if ours["setting"] != result["setting"]:
        raise click.ClickException(f"{result['ours']} was measured with another setting")
    return {
        variant: runs
        for variant, runs in by_variant(ours["runs"]).items()
        if variant == DENSE or variant.partition(":")[0] in methods or _is_default_pruning(variant)
    }


def _is_default_pruning(variant: str) -> bool:
    """Whether ``variant`` is the default recipe, with or without the steps after pruning."""
    return variant.split(",", maxsplit=1)[0] == default_variant().split(",")[0]


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality-smollm2-2of4": quality_table,
    "operators": operators_table,
    "peers-smollm2-2of4": peers_table,
    "quality-smollm2-mixed": quality_table,
    "peers-smollm2-mixed": peers_table,
    "quality-smollm2-50percent-mixed": patterns_table,
    "quality-gemma3-mixed": quality_table,
    "peers-gemma3-mixed": peers_table,
    "peers-smollm2-256": peers_table,
    "peers-gemma3-256": peers_table,
    "quality-smollm2-samples-8": sizes_table,
    "quality-gemma3-256": sizes_table,
    "quality-smollm2-steps": quality_table,
    "quality-smollm2-corrections-50percent": patterns_table,
    "retraining-smollm2-2of4": retraining_table,
    "time-smollm2": timing_table,
    "time-smollm2-solvers": timing_table,
    "dial-smollm2-2of4": budget_table,
    **EVIDENCE_TABLES,
    **SERVING_TABLES,
    **GPU_TABLES,
}


def render(page: str) -> str:
    """Return ``page`` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[match[2]](result)}\n{match[3]}"

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
