"""The tables of docs/evidence.md, from the results of the experiments on operators and layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def first_order_table(result: Result) -> str:
    """Objective gaps by products, then errors after rounding to 2:4 and a refit."""
    rows = result["rows"]
    budgets = sorted({row["products"] for row in rows if row["products"]})
    methods = _distinct(row["method"] for row in rows if row["products"])
    lines = []
    for kind in _distinct(row["coordinates"] for row in rows):
        lines += [_head(f"gap to the minimum, {kind} columns", [f"{item:g}" for item in budgets])]
        for method in methods:
            cells = []
            for budget in budgets:
                gaps = _pick(rows, "gap", coordinates=kind, method=method, products=budget)
                cells.append(f"{statistics.geometric_mean(gaps):.1e}" if gaps else "")
            lines.append(_line(method, cells))
        lines.append("")
    penalties = _distinct(row["penalty"] for row in rows)
    ends = sorted({row["products"] for row in rows if row["error_refitted"] and row["products"]})
    heads = [f"lambda {penalty:g}, {end:g} products" for penalty in penalties for end in ends]
    lines.append(_head("2:4 error after a refit, start = 1", heads))
    for method in [*methods, "minimiser"]:
        cells = []
        for penalty in penalties:
            start = _pick(rows, "error_refitted", penalty=penalty, method="start")
            for end in ends:
                products = 0 if method == "minimiser" else end
                found = _pick(
                    rows, "error_refitted", penalty=penalty, method=method, products=products
                )
                cells.append(_mean_ratio(found, start))
        lines.append(_line(method, cells))
    operators = _distinct(row["operator"] for row in rows)
    setting = result["setting"]
    lines.append(
        f"\n{setting['rows']} outputs of each of {', '.join(operators)}; lambda in units of the "
        f"mean absolute target; geometric means over operators{_over_kinds(rows)}; batches of "
        f"{setting['batch']} tokens. {_where(result)}"
    )
    return "\n".join(lines)


def penalty_search_table(result: Result) -> str:
    """What a search loses to a scan of many values, at equal trials and at equal products."""
    rows = result["rows"]
    kinds = [
        (equal, budget)
        for equal in ("trials", "products")
        for budget in sorted({row["budget"] for row in rows if row["equal"] == equal})
    ]
    lines = [_head("search", [f"{budget:g} {equal}" for equal, budget in kinds])]
    for method in _distinct(row["method"] for row in rows):
        cells = []
        for equal, budget in kinds:
            losses: dict[int, list[float]] = {}
            for row in rows:
                if (row["method"], row["equal"], row["budget"]) == (method, equal, budget):
                    loss = 100 * (row["error"] / row["scan_error"] - 1)
                    losses.setdefault(row["seed"], []).append(loss)
            means = [statistics.fmean(found) for found in losses.values()]
            cell = f"{statistics.fmean(means):.2f}"
            if len(means) > 1:
                cell += f" ({min(means):.2f} to {max(means):.2f})"
            cells.append(cell)
        lines.append(_line(method, cells))
    starts = [100 * (row["start_error"] / row["scan_error"] - 1) for row in rows]
    setting = result["setting"]
    lines.append(
        f"\nError above that of the best of a fine scan, in percent; the refitted start itself: "
        f"{statistics.fmean(starts):.1f}. Means over "
        f"{', '.join(_distinct(row['operator'] for row in rows))} ({setting['rows']} outputs each) "
        f"and starts {', '.join(_distinct(row['start'] for row in rows))}; for TPE over three "
        f"seeds, with their range. Optuna {setting['optuna']}. {_where(result)}"
    )
    return "\n".join(lines)


def gradient_blocks_table(result: Result) -> str:
    """Errors of whole decoder layers."""
    rows = result["rows"]
    layers = _distinct(row["layer"] for row in rows)
    heads = [f"layer {number}, {kind}" for number in layers for kind in ("held-out", "calibration")]
    lines = [_head("method", [*heads, "seconds"])]
    for method in _distinct(row["method"] for row in rows):
        best = [
            min(
                (row for row in rows if row["method"] == method and row["layer"] == number),
                key=lambda row: row["heldout_error"],
            )
            for number in layers
        ]
        cells = [
            f"{row[key]:.4f}" for row in best for key in ("heldout_error", "calibration_error")
        ]
        seconds = statistics.fmean(row["seconds"] for row in best)
        lines.append(_line(method, [*cells, f"{seconds:.0f}"]))
    lines.append(
        f"\nError of the layer's output relative to what the dense layer adds to its input; "
        f"{result['setting']['tokens']:,} calibration tokens; seconds of processor time. "
        f"{_where(result)}"
    )
    return "\n".join(lines)


def warm_starts_table(result: Result) -> str:
    """Errors of every start with every treatment, relative to plain Wanda."""
    rows = result["rows"]
    treatments = _distinct(row["treatment"] for row in rows)
    lines = []
    for pattern in _distinct(row["pattern"] for row in rows):
        lines.append(_head(f"start, {pattern}", treatments))
        base = {"pattern": pattern, "start": "wanda", "treatment": "as it is"}
        for start in _distinct(row["start"] for row in rows):
            cells = []
            for treatment in treatments:
                here = {"pattern": pattern, "start": start, "treatment": treatment}
                cells.append(
                    " / ".join(
                        _mean_ratio(_pick(rows, key, **here), _pick(rows, key, **base))
                        for key in ("calibration_error", "heldout_error")
                    )
                )
            lines.append(_line(start, cells))
        lines.append("")
    lines.append(
        f"Relative output error on calibration / held-out tokens, Wanda as it is = 1, geometric "
        f"means over {', '.join(_distinct(row['operator'] for row in rows))}. {_where(result)}"
    )
    return "\n".join(lines)


def stacked_penalties_table(result: Result) -> str:
    """Stacked against sequential products."""
    heads = ["largest difference", "time, stacked / one by one", "error, stacked / one by one"]
    lines = [_head("operator", heads)]
    for row in result["rows"]:
        cells = [
            f"{row['difference']:.0e}",
            f"{row['stacked_seconds'] / row['sequential_seconds']:.2f}",
            f"{row['stacked_error'] / row['sequential_error']:.4f}",
        ]
        lines.append(_line(f"{row['operator']}, {row['rows']} x {row['columns']}", cells))
    setting = result["setting"]
    lines.append(
        f"\n{len(setting['penalties'])} penalties, {setting['iterations']} steps each. "
        f"{_where(result)}"
    )
    return "\n".join(lines)


def operator_costs_table(result: Result) -> str:
    """Products with the Gram matrix, by method and operator."""
    rows = result["rows"]
    operators = _distinct(row["operator"] for row in rows)
    lines = [_head("products with G", operators)]
    for method in _distinct(row["method"] for row in rows):
        cells = [
            f"{_pick(rows, 'gram_products', method=method, operator=item)[0]}" for item in operators
        ]
        lines.append(_line(method, cells))
    lines.append(f"\n{result['setting']['pattern']}, defaults. {_where(result)}")
    return "\n".join(lines)


def paper_ablation_table(result: Result) -> str:
    """What is left of SparseGPT's gap, by method and text."""
    setting, machine, texts = result["setting"], result["machine"], list(result["setting"]["texts"])
    perplexities = {row["method"]: row["perplexity"] for row in result["rows"]}
    dense, base = perplexities["dense"], perplexities["sparsegpt, no correction"]
    lines = [_head("method", [*(f"gap, {text}" for text in texts), "products with G", "seconds"])]
    for row in result["rows"][1:]:
        gaps = [
            math.log(row["perplexity"][text] / dense[text]) / math.log(base[text] / dense[text])
            for text in texts
        ]
        cells = [f"{gap:.2f}" for gap in gaps]
        lines.append(
            _line(row["method"], [*cells, f"{row['gram_products']:,}", f"{row['seconds']:.0f}"])
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    numbers = " and ".join(map(str, setting["layers"]))
    lines.append(
        f"\n`{Path(setting['model']).name}`, decoder layers {numbers} pruned to 2:4, on "
        f"{setting['calibration']['samples'] * setting['calibration']['length']:,} tokens of the "
        f"packaged speeches; {setting['evaluation_windows']} evaluation windows a text; "
        f"{machine['cpu']}, torch {machine['torch']}, commits {commits}, "
        f"{machine['date']}."
    )
    return "\n".join(lines)


def calibration_memory_table(result: Result) -> str:
    """Peak memory by recipe and number of calibration windows."""
    rows, setting, machine = result["rows"], result["setting"], result["machine"]
    counts = _distinct(row["windows"] for row in rows)
    lines = [_head("peak memory, MiB", [f"{count} windows" for count in counts])]
    for recipe in _distinct(row["recipe"] for row in rows):
        peaks = [
            _pick(rows, "peak_memory_bytes", recipe=recipe, windows=count)[0] for count in counts
        ]
        lines.append(_line(f"`{recipe}`", [f"{peak / 2**20:,.0f}" for peak in peaks]))
    lines.append(
        f"\nLargest resident size of the whole process, of which `{Path(setting['model']).name}`'s "
        f"parameters are {setting['model_bytes'] / 2**20:,.0f} MiB; windows of "
        f"{setting['sequence_length']} tokens, {setting['layers']} decoder layers pruned. "
        f"{machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}."
    )
    return "\n".join(lines)


def _pick(rows: list[Result], key: str, **wanted: object) -> list[Any]:
    return [row[key] for row in rows if all(row[name] == item for name, item in wanted.items())]


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _mean_ratio(found: list[float], base: list[float]) -> str:
    if not found:
        return ""
    pairs = zip(found, base, strict=True)
    return f"{statistics.geometric_mean(value / unit for value, unit in pairs):.3f}"


def _over_kinds(rows: list[Result]) -> str:
    kinds = _distinct(row["coordinates"] for row in rows)
    return " (and, after rounding, both kinds of columns)" if len(kinds) > 1 else ""


def _head(first: str, cells: list[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |\n|---|{'---|' * len(cells)}"


def _line(first: str, cells: list[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def _where(result: Result) -> str:
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, commit "
        f"{machine['commit']}, {machine['date']}."
    )


EVIDENCE_TABLES = {
    "first-order": first_order_table,
    "penalty-search": penalty_search_table,
    "gradient-blocks": gradient_blocks_table,
    "warm-starts": warm_starts_table,
    "stacked-penalties": stacked_penalties_table,
    "operator-costs": operator_costs_table,
    "paper-ablation": paper_ablation_table,
    "calibration-memory": calibration_memory_table,
}
