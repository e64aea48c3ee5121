"""The sections on what was measured: perplexity, tasks, speed and size beside the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sparseserve.checkpoint.summary import MeasuredText
from sparseserve.page.benches import Bench, Speed
from sparseserve.page.charts import Bars, lying_bars
from sparseserve.page.evaluations import Figure, Row
from sparseserve.page.markup import Content, Html, element, folded, joined, table

_MIB = 2**20
_GAP = "The gap is ln(perplexity / dense perplexity): 0 is no loss, 0.1 is 11 % more perplexity."


def perplexity_section(
    measured: Sequence[MeasuredText], rows: Sequence[Row], benches: Sequence[Bench], folder: str
) -> Html:
    """Return the perplexities of the run itself, of ``evaluate`` and of ``bench``.

    Args:
        measured: By the run, within a budget.
        rows: By ``evaluate``.
        benches: By ``bench``.
        folder: The checkpoint, as commands name it.
    """
    lines: list[list[Content]] = [
        [item.text, "held out by the run", *_pair(item.dense_perplexity, item.perplexity)]
        for item in measured
    ]
    for row in rows:
        lines += _perplexity_lines(row)
    for bench in benches:
        details = f"bench: {bench.tokens:,} tokens, vllm, {bench.pruned.dtype}"
        lines.append(
            ["text of the bench", details, *_pair(bench.dense.perplexity, bench.pruned.perplexity)]
        )
    if not lines:
        return _not_measured(
            "Perplexity was not measured, or its results were not given to this page.",
            f"sparseserve evaluate {folder} --text held-out.txt --json > out.json\n"
            "sparseserve evaluate DENSE --text held-out.txt --json > dense.json\n"
            f"sparseserve report {folder} --evaluation out.json --evaluation dense.json",
        )
    columns = ("text", "how", "dense", "pruned", "gap")
    return joined(
        (
            table("Perplexity: lower is better", columns, lines, numbers=2),
            element("p", _GAP, class_="note"),
        )
    )


def tasks_section(rows: Sequence[Row]) -> Html:
    """Return the scores on tasks, one standard error behind each."""
    lines: list[list[Content]] = []
    for row in rows:
        pair = (_score(row.dense), _score(row.pruned))
        if row.dense or row.pruned:
            lines.append([row.any.subject, row.any.details, *pair, _difference(row)])
        lines += [
            [other.subject, f"{other.details}; {other.model}", "", _score(other), ""]
            for other in row.others
        ]
    columns = ("task", "how", "dense", "pruned", "difference")
    return table("Scores, and their standard errors", columns, lines, numbers=2)


def speed_section(benches: Sequence[Bench], folder: str) -> Html:
    """Return how many times as fast as the dense model the checkpoint ``folder`` is."""
    if not benches:
        return _not_measured(
            "Speed was not measured, or its results were not given to this page.",
            f"sparseserve bench {folder} --baseline DENSE -o bench.json\n"
            f"sparseserve report {folder} --bench bench.json",
        )
    return joined(part for bench in benches for part in _speed(bench))


def size_section(weight_bytes: int, dense_bytes: int | None, benches: Sequence[Bench]) -> Html:
    """Return sizes of the weights on disk, and in memory where a bench measured that."""
    known = dense_bytes or (benches[0].dense.weight_bytes if benches else None)
    if known is None:
        return joined(
            (
                element("p", f"The weights take {mebibytes(weight_bytes)} on disk."),
                element(
                    "p", "Give the dense model with ", element("code", "--baseline"), " to compare."
                ),
            )
        )
    pairs = [("on disk", known, weight_bytes)]
    pairs += [
        (f"in memory, {bench.pruned.dtype}", bench.dense.memory_bytes, bench.pruned.memory_bytes)
        for bench in benches
    ]
    rows = [
        Bars(
            f"weights {label}",
            (dense / _MIB, pruned / _MIB),
            (mebibytes(dense), f"{mebibytes(pruned)}, {_ratio(pruned, dense)}"),
        )
        for label, dense, pruned in pairs
    ]
    cells = [
        (f"weights {label}", mebibytes(dense), mebibytes(pruned), _ratio(pruned, dense))
        for label, dense, pruned in pairs
    ]
    return joined(
        (
            lying_bars("Size of the weights", ("dense", "pruned"), rows),
            folded("Sizes in figures", table("Size", ("", "dense", "pruned", "ratio"), cells)),
        )
    )


def mebibytes(size: int) -> str:
    """Return a size as people read it."""
    return f"{size / _MIB:,.1f} MiB"


def _perplexity_lines(row: Row) -> Iterator[list[Content]]:
    dense = row.dense.value if row.dense else None
    if row.dense or row.pruned:
        pruned = row.pruned.value if row.pruned else None
        yield [row.any.subject, row.any.details, *_pair(dense, pruned)]
    for other in row.others:
        details = f"{other.details}; another model, {other.model}"
        yield [other.subject, details, *_pair(dense, other.value)]


def _pair(dense: float | None, pruned: float | None) -> tuple[str, str, str]:
    both = dense is not None and pruned is not None
    return (
        "" if dense is None else f"{dense:,.2f}",
        "" if pruned is None else f"{pruned:,.2f}",
        f"{math.log(pruned / dense):.4f}" if both and dense and pruned else "",
    )


def _score(figure: Figure | None) -> str:
    if figure is None:
        return ""
    error = f" ± {figure.standard_error:.4f}" if figure.standard_error is not None else ""
    return f"{figure.value:.4f}{error}"


def _difference(row: Row) -> str:
    if row.dense is None or row.pruned is None:
        return ""
    return f"{row.pruned.value - row.dense.value:+.4f}"


def _speed(bench: Bench) -> Iterator[Html]:
    yield element(
        "p",
        f"Measured by sparseserve bench on {bench.machine}, in {bench.pruned.dtype}, on "
        f"{bench.date[:10]}: {bench.output_length} new tokens, medians of {bench.repeats} paired "
        "runs. The dashed line is the dense model.",
    )
    rows = [
        Bars(
            f"batch {item.batch_size}, {item.input_length:,} tokens in",
            (item.decode, item.prefill),
            (f"{item.decode:.2f}x", f"{item.prefill:.2f}x"),
        )
        for item in bench.speeds
    ]
    yield lying_bars(
        "Speed over the dense model by batch size",
        ("writing tokens", "reading the prompt"),
        rows,
        reference=1.0,
    )
    yield folded("Times in figures", _times(bench.speeds))


def _times(speeds: Sequence[Speed]) -> Html:
    rows: list[list[Content]] = []
    for item in speeds:
        dense, pruned = item.dense, item.pruned
        rows.append(
            [
                f"batch {item.batch_size}, {item.input_length:,} tokens in",
                *(f"{value * 1000:,.1f}" for value in (dense.first_token, pruned.first_token)),
                *(f"{value * 1000:,.1f}" for value in (dense.each_token, pruned.each_token)),
                *(f"{value:,.1f}" for value in (dense.tokens_per_second, pruned.tokens_per_second)),
            ]
        )
    names = ("first token, ms", "each token, ms", "tokens a second")
    columns = [f"{name}: {side}" for name in names for side in ("dense", "pruned")]
    return table("Medians", ("", *columns), rows)


def _not_measured(text: str, commands: str) -> Html:
    return joined((element("p", f"{text} These commands do so:"), element("pre", commands)))


def _ratio(pruned: float, dense: float) -> str:
    return f"{pruned / dense:.3f}" if dense else ""
