"""Writes the tables of README and docs from the committed results.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a result file without
``.json`` and a line of TABLES. ``python -m benchmarks.tables`` rewrites them all; with ``--check``
it changes nothing and fails if one is not what its result says.
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

from benchmarks.evidence_tables import EVIDENCE_TABLES
from sparseserve.recipe import PruneRecipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/method.md", "docs/serving.md", "docs/evidence.md")
DENSE = "the dense model"
MARKED = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quality_table(result: dict[str, Any]) -> str:
    """Perplexity by method: mean and range over seeds."""
    setting, machine = result["setting"], result["machine"]
    texts = list(setting["texts"])
    lines = [
        f"| method | error correction | {' | '.join(f'perplexity, {text}' for text in texts)} |",
        "|---|---|" + "---|" * len(texts),
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault(run["variant"], []).append(run)
    for variant, runs in groups.items():
        cells = [_spread([run["perplexity"][text] for run in runs]) for text in texts]
        head, *steps = variant.split(",")
        method, _, correction = head.partition(":")
        label = ", then ".join([method, *steps])
        lines.append(f"| {label} | {correction} | {' | '.join(cells)} |")
    seeds = max(len(runs) for runs in groups.values())
    tokens = setting["samples"] * setting["sequence_length"]
    drawn = f"{seeds} calibration seeds (mean, lowest to highest; one where one figure stands)"
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, {tokens:,} calibration tokens "
        f"of {_calibration_text(setting)}, {drawn if seeds > 1 else 'one calibration seed'}, "
        f"perplexity on {setting['evaluation_windows']} held-out windows of "
        f"{setting['evaluation_length']} tokens of each text; {machine['cpu']}, "
        f"torch {machine['torch']}, commit {machine['commit']}, {machine['date']}."
    )
    return "\n".join(lines)


def _calibration_text(setting: dict[str, Any]) -> str:
    source = setting["calibration"]
    return f"`{Path(source).name}`" if source else "the packaged speeches"


def bench_table(result: dict[str, Any]) -> str:
    """Dense against 2:4 through vLLM."""
    own, base = result["model"], result["baseline"]
    lines = [
        "| | dense | 2:4 packed | ratio |",
        "|---|---|---|---|",
        _ratio("weights on disk, MiB", base["weight_bytes"] / 2**20, own["weight_bytes"] / 2**20),
        *(
            _ratio(f"{what}, MiB", base["memory"][key] / 2**20, own["memory"][key] / 2**20)
            for what, key in (
                ("weights in memory", "weight_bytes"),
                ("memory of the engine without its cache", "bytes_without_cache"),
            )
        ),
        _ratio("perplexity", base["perplexity"], own["perplexity"]),
    ]
    for other, found in zip(base["latency"], own["latency"], strict=True):
        lines += _latency_lines(other, found, len(result["plan"]["input_lengths"]) > 1)
    for row in result.get("http", {}).get("rows", ()):
        lines += _load_lines(row)
    plan, versions = result["plan"], result["versions"]
    lengths = ", ".join(map(str, plan["input_lengths"]))
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines.append(
        f"\n{lengths} tokens in, {plan['output_length']} out, medians of "
        f"{plan['repeats']} runs in turns; {software}; {result['date'][:10]}."
    )
    return "\n".join(lines)


def _latency_lines(base: dict[str, Any], own: dict[str, Any], tell_length: bool) -> list[str]:
    run = f"batch {own['batch_size']}"
    if tell_length:
        run = f"{own['input_length']} in, {run}"
    return [
        _ratio(label, base[key]["median"] * scale, own[key]["median"] * scale)
        for label, key, scale in (
            (f"TTFT, {run}, ms", "ttft_seconds", 1000),
            (f"TPOT, {run}, ms", "tpot_seconds", 1000),
            (f"tokens per second, {run}", "tokens_per_second", 1),
        )
    ]


def _load_lines(row: dict[str, Any]) -> list[str]:
    load = f"{row['concurrency']} at once"
    if row["request_rate"]:
        load = f"{row['request_rate']:g} requests a second"
    return [
        _ratio(f"HTTP, {load}: {label}", row["baseline"][key], row["model"][key])
        for label, key in (
            ("TTFT, ms", "ttft_ms"),
            ("TPOT, ms", "tpot_ms"),
            ("tokens per second", "tokens_per_second"),
        )
    ]


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
        lines.append(f"| {tool} | {method} | {_perplexities(runs, texts)} | {changed} |")
    ours = _our_runs(result, {method for _, method in groups})
    for label, runs in ours.items():
        tool = "" if label == DENSE else "sparseserve"
        lines.append(f"| {tool} | {label} | {_perplexities(runs, texts)} | |")
    recipe = PruneRecipe()
    default = ours.get(_label(recipe.method, recipe.error_correction))
    if default and DENSE in ours:
        for (tool, method), others in groups.items():
            shares = _gap_shares(default, others, ours[DENSE][0], texts)
            lines.append(f"| | gap of our default / {tool.split()[0]} {method} | {shares} | |")
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, the same "
        f"{setting['samples'] * setting['sequence_length']:,} calibration tokens a seed for all "
        f"(mean, lowest to highest over seeds; one seed where one figure stands); evaluated alike; "
        f"{result['machine']['date']}."
    )
    return "\n".join(lines)


def _gap_shares(
    runs: list[dict[str, Any]],
    others: list[dict[str, Any]],
    dense: dict[str, Any],
    texts: list[str],
) -> str:
    """What of the others' gap is left; a gap is ln(perplexity / dense perplexity), over seeds."""

    def gap(found: list[dict[str, Any]], text: str) -> float:
        base = dense["perplexity"][text]
        return statistics.fmean(math.log(run["perplexity"][text] / base) for run in found)

    return " | ".join(f"{gap(runs, text) / gap(others, text):.2f}" for text in texts)


def _our_runs(result: dict[str, Any], methods: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Our runs of ``methods`` and of the default recipe, from a result of the same setting."""
    if not result["ours"]:
        return {}
    ours = json.loads((RESULTS / result["ours"]).read_text(encoding="utf-8"))
    if ours["setting"] != result["setting"]:
        raise click.ClickException(f"{result['ours']} was measured with another setting")
    default = PruneRecipe()
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in ours["runs"]:
        method, _, correction = run["variant"].partition(":")
        if run["variant"] == "dense":
            groups[DENSE] = [run]
        elif method in methods or run["variant"] == f"{default.method}:{default.error_correction}":
            groups.setdefault(_label(method, correction), []).append(run)
    return groups


def _label(method: str, correction: str) -> str:
    return f"{method}, error correction {correction}"


def _perplexities(runs: list[dict[str, Any]], texts: list[str]) -> str:
    return " | ".join(_spread([run["perplexity"][text] for run in runs]) for text in texts)


def cpu_kernels_table(result: dict[str, Any]) -> str:
    """Each batch size's fastest 2:4 kernel against torch's products and our own dense one."""
    lines = [
        "| shape | batch | fastest 2:4 kernel | ms | torch, float32 or bfloat16, ms | gain "
        "| gain over our dense kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = row["milliseconds"]
        sparse = {name: times[name] for name in times if name.startswith("cpu_")}
        dense = sparse.pop("cpu_dense")
        best = min(sparse, key=lambda name: sparse[name])
        base = min(times["torch_float32"], times["torch_bfloat16"])
        lines.append(
            f"| {row['rows']} x {row['columns']} | {row['batch']} | `{best}` | {sparse[best]:.3f} "
            f"| {base:.3f} | {base / sparse[best]:.2f} | {dense / sparse[best]:.2f} |"
        )
    machine = result["machine"]
    lines.append(
        f"\nWeights of bfloat16 values, medians of {result['setting']['repeats']} turns; "
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}."
    )
    return "\n".join(lines)


def tune_table(result: dict[str, Any]) -> str:
    """How many times as fast as vLLM's dense product the chosen kernels are, by batch size."""
    batches = list(result["speedup"])
    lines = [
        f"| layer | how many | {' | '.join(batches)} |",
        "|---|---|" + "---|" * len(batches),
    ]
    for layers in result["layers"]:
        gains = [layers["dense_seconds"][b] / layers["seconds"][b] for b in batches]
        cells = " | ".join(f"{gain:.2f}" for gain in gains)
        lines.append(f"| {layers['layer']} | {len(layers['names'])} | {cells} |")
    total = sum(len(layers["names"]) for layers in result["layers"])
    cells = " | ".join(f"{gain:.2f}" for gain in result["speedup"].values())
    lines.append(f"| together | {total} | {cells} |")
    machine, versions = result["machine"], result["versions"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines.append(
        f"\n`{Path(result['path']).name}`, columns are tokens at once; {machine['cpu']}, "
        f"{machine['cores']} cores, of which vLLM leaves one free; {software}; "
        f"{result['date'][:10]}."
    )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality-smollm2-2of4": quality_table,
    "bench-smollm2-2of4": bench_table,
    "operators": operators_table,
    "cpu-kernels": cpu_kernels_table,
    "tune-smollm2-2of4": tune_table,
    "peers-smollm2-2of4": peers_table,
    "quality-smollm2-mixed": quality_table,
    "peers-smollm2-mixed": peers_table,
    "quality-smollm2-50percent": quality_table,
    "quality-gemma3-mixed": quality_table,
    "peers-gemma3-mixed": peers_table,
    **EVIDENCE_TABLES,
}


def render(page: str) -> str:
    """Return ``page`` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}{TABLES[match[2]](result)}\n{match[3]}"

    return MARKED.sub(table, page)


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    digits = 2 if mean < 1000 else 0
    if len(values) == 1 or math.isclose(min(values), max(values)):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _ratio(name: str, base: float, own: float) -> str:
    return f"| {name} | {base:,.2f} | {own:,.2f} | {own / base:.3f} |"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a table is out of date.")
def main(check: bool) -> None:
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = render(before)
        if check and before != after:
            raise click.ClickException(f"{name}: run python -m benchmarks.tables")
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
