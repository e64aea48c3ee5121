"""What ``sparseserve bench`` found: speed, memory and size beside the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseserve.errors import RecipeError
from sparseserve.page.json_object import JsonObject
from sparseserve.paths import shown

_MADE_BY = "sparseserve bench --json"


@dataclass(frozen=True, slots=True)
class Latency:
    """Medians of one prompt length and batch size; seconds, and tokens a second."""

    first_token: float
    each_token: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One prompt length and batch size; ``prefill`` and ``decode`` are dense time / 2:4 time."""

    input_length: int
    batch_size: int
    prefill: float
    decode: float
    dense: Latency
    pruned: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One of the two models under vLLM.

    Attributes:
        path: Its folder, as it was given.
        weight_bytes: Of its files.
        memory_bytes: Of its weights, as they are served.
        perplexity: On the windows of the bench.
        dtype: That the engine computed in.
    """

    path: str
    weight_bytes: int
    memory_bytes: int
    perplexity: float
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One file: both models on one machine, and ``tokens`` of perplexity."""

    machine: str
    date: str
    output_length: int
    repeats: int
    tokens: int
    dense: Served
    pruned: Served
    speeds: tuple[Speed, ...]


def read_bench(file: Path, weight_bytes: int) -> Bench:
    """Read a file of the checkpoint whose weights have ``weight_bytes`` on disk.

    Raises:
        RecipeError: It is missing, nothing that ``bench`` writes, or of another checkpoint.
    """
    found = JsonObject.read(file, _MADE_BY)
    model, baseline, plan = (found.object(key) for key in ("model", "baseline", "plan"))
    pruned = _served(model)
    if pruned.weight_bytes != weight_bytes:
        raise RecipeError(
            f"--bench {file}: measured {shown(pruned.path)} with {pruned.weight_bytes:,} bytes of "
            f"weights, this checkpoint has {weight_bytes:,}: bench this one"
        )
    return Bench(
        machine=_machine(found.object("machine")),
        date=found.text("date"),
        output_length=plan.whole("output_length"),
        repeats=plan.whole("repeats"),
        tokens=model.whole("tokens"),
        dense=_served(baseline),
        pruned=pruned,
        speeds=_speeds(found.objects("speedups"), baseline, model),
    )


def _served(found: JsonObject) -> Served:
    return Served(
        path=found.text("path"),
        weight_bytes=found.whole("weight_bytes"),
        memory_bytes=found.object("memory").whole("weight_bytes"),
        perplexity=found.number("perplexity", above=0),
        dtype=found.object("engine").text("dtype"),
    )


def _speeds(
    speedups: Sequence[JsonObject], dense: JsonObject, pruned: JsonObject
) -> tuple[Speed, ...]:
    latencies = [
        {(row.whole("input_length"), row.whole("batch_size")): row for row in side}
        for side in (dense.objects("latency"), pruned.objects("latency"))
    ]
    found = []
    for item in speedups:
        key = (item.whole("input_length"), item.whole("batch_size"))
        if any(key not in rows for rows in latencies):
            raise RecipeError(
                f"{item.where}: has no latency for {key[0]} tokens and batch {key[1]}: give a file "
                f"that {_MADE_BY} wrote"
            )
        found.append(
            Speed(
                input_length=key[0],
                batch_size=key[1],
                prefill=item.number("prefill", above=0),
                decode=item.number("decode", above=0),
                dense=_latency(latencies[0][key]),
                pruned=_latency(latencies[1][key]),
            )
        )
    return tuple(found)


def _latency(row: JsonObject) -> Latency:
    return Latency(
        *(
            row.object(key).number("median", above=0)
            for key in ("ttft_seconds", "tpot_seconds", "tokens_per_second")
        )
    )


def _machine(found: JsonObject) -> str:
    cores = found.whole("cores")
    beside = f"{found.text('gpu')}, " if "gpu" in found else ""
    return f"{beside}{found.text('cpu')}, {cores} {'core' if cores == 1 else 'cores'}"
