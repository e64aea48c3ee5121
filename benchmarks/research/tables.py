"""The tables of the experiments on single operators and decoder layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.markdown import (
    commit_and_date,
    distinct,
    head,
    line,
    pick,
)
from benchmarks.harness.results import Result


def operators_table(result: Result) -> str:
    """Relative output error of one operator by method."""
    rows, machine = result["rows"], result["machine"]
    heads = [
        f"{pattern} {kind}"
        for pattern in distinct(row["pattern"] for row in rows)
        for kind in ("calibration", "held-out")
    ]
    lines = [head("method", *heads, "products with G")]
    for method in distinct(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        errors = [row[key] for row in own for key in ("calibration_error", "heldout_error")]
        cells = [f"{error:.4f}" for error in errors]
        lines.append(line(method, *cells, str(own[0]["gram_products"])))
    lines.append(f"\nCommit {machine['commit']}, torch {machine['torch']}, {machine['date']}.")
    return "\n".join(lines)


def admm_schedule_table(result: Result) -> str:
    """Errors and updates of each schedule as parts of those of the first, by damping."""
    rows = result["rows"]
    knobs = ("first_penalty", "growth", "interval")
    dampings = distinct(row["damping"] for row in rows)
    columns = ("error", "held-out error", "updates")
    heads = [f"{column}, damping {each:g}" for each in dampings for column in columns]
    lines = [head("first penalty", "growth", "updates with one", *heads)]
    schedules = distinct(tuple(row[knob] for knob in knobs) for row in rows)
    for schedule in schedules:
        cells = []
        for damping in dampings:
            for key in ("calibration_error", "heldout_error", "updates"):
                own, first = (
                    pick(rows, key, damping=damping, **dict(zip(knobs, each, strict=True)))
                    for each in (schedule, schedules[0])
                )
                shares = [one / other for one, other in zip(own, first, strict=True)]
                digits = 2 if key == "updates" else 4
                cells.append(f"{statistics.geometric_mean(shares):.{digits}f}")
        lines.append(line(*(f"{knob:g}" for knob in schedule), *cells))
    operators = ", ".join(distinct(row["operator"] for row in rows))
    machine = result["machine"]
    lines.append(
        f"\nParts of the first row, geometric means over {operators}; 2:4 after the refit; "
        f"torch {machine['torch']}, {commit_and_date(machine)}"
    )
    return "\n".join(lines)


def first_order_table(result: Result) -> str:
    """Objective gaps by products, then errors after rounding to 2:4 and a refit."""
    rows = result["rows"]
    budgets = sorted({row["products"] for row in rows if row["products"]})
    methods = distinct(row["method"] for row in rows if row["products"])
    lines = []
    for kind in distinct(row["coordinates"] for row in rows):
        lines += [head(f"gap to the minimum, {kind} columns", *(f"{item:g}" for item in budgets))]
        for method in methods:
            cells = []
            for budget in budgets:
                gaps = pick(rows, "gap", coordinates=kind, method=method, products=budget)
                cells.append(f"{statistics.geometric_mean(gaps):.1e}" if gaps else "")
            lines.append(line(method, *cells))
        lines.append("")
    penalties = distinct(row["penalty"] for row in rows)
    ends = sorted({row["products"] for row in rows if row["error_refitted"] and row["products"]})
    heads = [f"lambda {penalty:g}, {end:g} products" for penalty in penalties for end in ends]
    lines.append(head("2:4 error after a refit, start = 1", *heads))
    for method in [*methods, "minimiser"]:
        cells = []
        for penalty in penalties:
            start = pick(rows, "error_refitted", penalty=penalty, method="start")
            for end in ends:
                products = 0 if method == "minimiser" else end
                found = pick(
                    rows, "error_refitted", penalty=penalty, method=method, products=products
                )
                cells.append(_mean_ratio(found, start))
        lines.append(line(method, *cells))
    operators = distinct(row["operator"] for row in rows)
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
    lines = [head("search", *(f"{budget:g} {equal}" for equal, budget in kinds))]
    for method in distinct(row["method"] for row in rows):
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
        lines.append(line(method, *cells))
    starts = [100 * (row["start_error"] / row["scan_error"] - 1) for row in rows]
    setting = result["setting"]
    lines.append(
        f"\nError above that of the best of a fine scan, in percent; the refitted start itself: "
        f"{statistics.fmean(starts):.1f}. Means over "
        f"{', '.join(distinct(row['operator'] for row in rows))} ({setting['rows']} outputs each) "
        f"and starts {', '.join(distinct(row['start'] for row in rows))}; for TPE over three "
        f"seeds, with their range. Optuna {setting['optuna']}. {_where(result)}"
    )
    return "\n".join(lines)


def gradient_blocks_table(result: Result) -> str:
    """Errors of whole decoder layers."""
    rows = result["rows"]
    layers = distinct(row["layer"] for row in rows)
    heads = [f"layer {number}, {kind}" for number in layers for kind in ("held-out", "calibration")]
    lines = [head("method", *heads, "seconds")]
    for method in distinct(row["method"] for row in rows):
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
        lines.append(line(method, *cells, f"{seconds:.0f}"))
    lines.append(
        f"\nError of the layer's output relative to what the dense layer adds to its input; "
        f"{result['setting']['tokens']:,} calibration tokens; seconds of processor time. "
        f"{_where(result)}"
    )
    return "\n".join(lines)


def warm_starts_table(result: Result) -> str:
    """Errors of every start with every treatment, relative to plain Wanda."""
    rows = result["rows"]
    treatments = distinct(row["treatment"] for row in rows)
    lines = []
    for pattern in distinct(row["pattern"] for row in rows):
        lines.append(head(f"start, {pattern}", *treatments))
        base = {"pattern": pattern, "start": "wanda", "treatment": "as it is"}
        for start in distinct(row["start"] for row in rows):
            cells = []
            for treatment in treatments:
                here = {"pattern": pattern, "start": start, "treatment": treatment}
                cells.append(
                    " / ".join(
                        _mean_ratio(pick(rows, key, **here), pick(rows, key, **base))
                        for key in ("calibration_error", "heldout_error")
                    )
                )
            lines.append(line(start, *cells))
        lines.append("")
    lines.append(
        f"Relative output error on calibration / held-out tokens, Wanda as it is = 1, geometric "
        f"means over {', '.join(distinct(row['operator'] for row in rows))}. {_where(result)}"
    )
    return "\n".join(lines)


def stacked_penalties_table(result: Result) -> str:
    """Stacked against sequential products."""
    heads = ["largest difference", "time, stacked / one by one", "error, stacked / one by one"]
    lines = [head("operator", *heads)]
    for row in result["rows"]:
        cells = [
            f"{row['difference']:.0e}",
            f"{row['stacked_seconds'] / row['sequential_seconds']:.2f}",
            f"{row['stacked_error'] / row['sequential_error']:.4f}",
        ]
        lines.append(line(f"{row['operator']}, {row['rows']} x {row['columns']}", *cells))
    setting = result["setting"]
    lines.append(
        f"\n{len(setting['penalties'])} penalties, {setting['iterations']} steps each. "
        f"{_where(result)}"
    )
    return "\n".join(lines)


def operator_costs_table(result: Result) -> str:
    """Products with the Gram matrix, by method and operator."""
    rows = result["rows"]
    operators = distinct(row["operator"] for row in rows)
    lines = [head("products with G", *operators)]
    for method in distinct(row["method"] for row in rows):
        cells = [
            f"{pick(rows, 'gram_products', method=method, operator=item)[0]}" for item in operators
        ]
        lines.append(line(method, *cells))
    lines.append(f"\n{result['setting']['pattern']}, defaults. {_where(result)}")
    return "\n".join(lines)


def paper_ablation_table(result: Result) -> str:
    """What is left of SparseGPT's gap, by method and text."""
    setting, machine, texts = result["setting"], result["machine"], list(result["setting"]["texts"])
    perplexities = {row["method"]: row["perplexity"] for row in result["rows"]}
    dense, base = perplexities["dense"], perplexities["sparsegpt, no correction"]
    lines = [head("method", *(f"gap, {text}" for text in texts), "products with G", "seconds")]
    for row in result["rows"][1:]:
        gaps = [
            math.log(row["perplexity"][text] / dense[text]) / math.log(base[text] / dense[text])
            for text in texts
        ]
        cells = [f"{gap:.2f}" for gap in gaps]
        lines.append(
            line(row["method"], *cells, f"{row['gram_products']:,}", f"{row['seconds']:.0f}")
        )
    commits = ", ".join(dict.fromkeys(row["commit"] for row in result["rows"]))
    numbers = " and ".join(map(str, setting["layers"]))
    lines.append(
        f"\n`{Path(setting['model']).name}`, decoder layers {numbers} pruned to 2:4, on "
        f"{setting['calibration']['samples'] * setting['calibration']['length']:,} tokens of the "
        f"packaged speeches; {setting['evaluation_windows']} evaluation windows a text; "
        f"{machine['cpu']}, torch {machine['torch']}, commits {commits}, {machine['date']}."
    )
    return "\n".join(lines)


def _mean_ratio(found: list[float], base: list[float]) -> str:
    if not found:
        return ""
    pairs = zip(found, base, strict=True)
    return f"{statistics.geometric_mean(value / unit for value, unit in pairs):.3f}"


def _over_kinds(rows: list[Result]) -> str:
    kinds = distinct(row["coordinates"] for row in rows)
    return " (and, after rounding, both kinds of columns)" if len(kinds) > 1 else ""


def _where(result: Result) -> str:
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
        f"{commit_and_date(machine)}"
    )


RESEARCH_TABLES: dict[str, Callable[[Result], str]] = {
    "operators": operators_table,
    "admm-schedule": admm_schedule_table,
    "first-order": first_order_table,
    "penalty-search": penalty_search_table,
    "gradient-blocks": gradient_blocks_table,
    "warm-starts": warm_starts_table,
    "stacked-penalties": stacked_penalties_table,
    "operator-costs": operator_costs_table,
    "paper-ablation": paper_ablation_table,
}
