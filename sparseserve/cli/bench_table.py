"""What ``sparseserve bench`` found, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from sparseserve.serving.measure.comparison import Comparison
    from sparseserve.serving.measure.load import LoadRow

MIB = 2**20


def comparison_table(found: Comparison) -> Table:
    """Return size, quality, prefill and decoding of both sides."""
    from rich.table import Table

    model, baseline = found.model, found.baseline
    memory = (baseline.memory, model.memory)
    beside = "on the GPU" if memory[0].gpu_bytes is not None else "of the process"
    table = Table("", "baseline", "2:4", "ratio", box=None)
    _row(table, "weights on disk, MiB", *(side.weight_bytes / MIB for side in (baseline, model)))
    _row(table, "weights in memory, MiB", *(side.weight_bytes / MIB for side in memory))
    _row(
        table,
        f"memory {beside} without cache, MiB",
        *(side.bytes_without_cache / MIB for side in memory),
    )
    _row(table, "perplexity", *(side.perplexity.perplexity for side in (baseline, model)))
    for cells in _latency_cells(found):
        table.add_row(*cells)
    return table


def load_table(rows: Sequence[LoadRow]) -> Table:
    """Return what two servers made of each level of load."""
    from rich.table import Table

    table = Table("HTTP", "baseline", "2:4", "ratio", box=None)
    for row in rows:
        base, own = row.baseline, row.model
        run = f"{row.input_length} in, {row.level}"
        for name, first, second in (
            ("TTFT, median, ms", base.ttft_ms, own.ttft_ms),
            ("TTFT, p99, ms", base.p99_ttft_ms, own.p99_ttft_ms),
            ("TPOT, median, ms", base.tpot_ms, own.tpot_ms),
            ("TPOT, p99, ms", base.p99_tpot_ms, own.p99_tpot_ms),
            ("ITL, median, ms", base.itl_ms, own.itl_ms),
            ("ITL, p99, ms", base.p99_itl_ms, own.p99_itl_ms),
            ("requests/s", base.requests_per_second, own.requests_per_second),
            ("tokens/s", base.tokens_per_second, own.tokens_per_second),
        ):
            _row(table, f"{run}: {name}", first, second)
    return table


def _latency_cells(found: Comparison) -> Iterator[tuple[str, str, str, str]]:
    rows = zip(found.baseline.latency, found.model.latency, found.speedups, strict=True)
    for base, own, speedup in rows:
        run = f"{own.input_length} in, batch {own.batch_size}"
        prefill, decode = f"{speedup.prefill:.2f}x speed", f"{speedup.decode:.2f}x speed"
        for name, scale, first, second, ratio in (
            ("TTFT, ms", 1000, base.ttft_seconds.median, own.ttft_seconds.median, prefill),
            (
                "prefill, tokens/s",
                1,
                base.prefill_tokens_per_second.median,
                own.prefill_tokens_per_second.median,
                "",
            ),
            ("TPOT, ms", 1000, base.tpot_seconds.median, own.tpot_seconds.median, decode),
            ("ITL, median, ms", 1000, base.itl_seconds.median, own.itl_seconds.median, ""),
            ("ITL, p99, ms", 1000, base.itl_seconds.p99, own.itl_seconds.p99, ""),
            ("tokens/s", 1, base.tokens_per_second.median, own.tokens_per_second.median, ""),
        ):
            values = [f"{value * scale:,.2f}" for value in (first, second)]
            yield f"{run}: {name}", values[0], values[1], ratio or f"{second / first:.3f}"


def _row(table: Table, name: str, baseline: float, model: float) -> None:
    table.add_row(name, f"{baseline:,.2f}", f"{model:,.2f}", f"{model / baseline:.3f}")
