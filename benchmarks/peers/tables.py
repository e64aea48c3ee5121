"""The table of other tools beside ours, from what ``benchmarks.peers.compare`` wrote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, read_result
from benchmarks.peers.timing import OURS, timing_table
from benchmarks.quality.compare import default_variant
from benchmarks.quality.tables import (
    DENSE,
    by_variant,
    further_windows,
    label,
    perplexities,
    tokens,
)


def peers_table(result: Result) -> str:
    """Perplexity by tool and method, ours of the same methods and setting among them."""
    setting = result["setting"]
    texts = list(setting["texts"])
    heads = [f"perplexity, {text}" for text in texts]
    lines = [head("tool", "method", *heads, "kept weights changed")]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        tool = f"{run['worker']['tool']} {run['worker']['version']}"
        groups.setdefault((tool, run["worker"]["method"]), []).append(run)
    for (tool, method), runs in groups.items():
        changed = f"{statistics.fmean(run['changed_weights'] for run in runs):.0%}"
        lines.append(line(tool, method, perplexities(runs, texts), changed))
    ours = _our_runs(result, {method for _, method in groups})
    for variant, runs in ours.items():
        tool, name = ("", "the dense model") if variant == DENSE else (OURS, label(variant))
        lines.append(f"| {tool} | {name} | {perplexities(runs, texts)} | |")
    for variant in [variant for variant in ours if _is_default_pruning(variant)]:
        for (tool, method), others in groups.items():
            shares = _gap_shares(ours[variant], others, ours[DENSE][0], texts)
            name = f"gap of {label(variant)} / {tool.split()[0]} {method}"
            lines.append(f"| | {name} | {shares} | |")
    but = " but for further windows" if any(map(further_windows, ours)) else ""
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, the same "
        f"{tokens(setting):,} calibration tokens a seed for all{but} "
        f"(mean, lowest to highest over seeds; one seed where one figure stands); evaluated alike; "
        f"the other tools' runs by commit {result['machine']['commit']}, "
        f"{result['machine']['date']}."
    )
    return "\n".join(lines)


def peers_serving_table(result: Result) -> str:
    """What each way to serve a model takes, how fast it is, and its perplexity."""
    setting = result["setting"]
    sizes = [str(size) for size in setting["batch_sizes"]]
    decoding = [f"new tokens a second, batch {size}" for size in sizes]
    lines = [
        head(
            *("program", "weights", "threads", "MB on disk", "MB in memory"),
            *("prompt tokens a second", *decoding, "perplexity"),
        )
    ]
    for row in result["systems"]:
        lines.append(
            line(
                *(row["program"], row["weights"], str(row["threads"] or "as its server")),
                *(f"{row[key] / 1e6:,.0f}" for key in ("disk_bytes", "memory_bytes")),
                f"{row['prompt_tokens_per_second']:.0f}",
                *(f"{row['new_tokens_per_second'][size]:.0f}" for size in sizes),
                f"{row['perplexity']:.2f}",
            )
        )
    lines.append(
        f"\n`{setting['model']}`; prompts of {setting['input_lengths'][0]} tokens, "
        f"{setting['output_length']} new ones each; medians of {setting['repeats']} runs in turns; "
        f"perplexity on {setting['windows']} windows of 512 tokens of "
        f"{Path(setting['text']).name}; memory is that of the process without vLLM's cache; "
        f"{processor_and_software(result['machine'])}"
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


def _our_runs(result: Result, methods: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Our runs of ``methods`` and of the default recipe, whichever steps follow, by variant.

    They are taken from a result of the same setting.
    """
    if not result["ours"]:
        return {}
    ours = read_result(RESULTS / result["ours"])
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


PEER_TABLES: dict[str, Callable[[Result], str]] = {
    "peers-smollm2-2of4": peers_table,
    "peers-smollm2-mixed": peers_table,
    "peers-gemma3-mixed": peers_table,
    "peers-smollm2-256": peers_table,
    "peers-gemma3-256": peers_table,
    "peers-qwen-1.5b-mixed": peers_table,
    "peers-serving-smollm2": peers_serving_table,
    "peers-serving-qwen-1.5b": peers_serving_table,
    "time-smollm2": timing_table,
    "time-smollm2-solvers": timing_table,
}
