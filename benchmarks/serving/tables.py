"""Tables of what serving measured: engines, kernels, and what agrees with what."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.markdown import (
    commit_and_date,
    distinct,
    engine_software,
    head,
    line,
    processor_and_software,
)
from benchmarks.harness.results import Result


def bench_table(result: Result) -> str:
    """Dense against 2:4 through vLLM."""
    own, base = result["model"], result["baseline"]
    lines = [
        head("", "dense", "2:4 packed", "ratio"),
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
    plan, machine = result["plan"], result["machine"]
    lengths = ", ".join(map(str, plan["input_lengths"]))
    lines.append(
        f"\n{lengths} tokens in, {plan['output_length']} out, medians of "
        f"{plan['repeats']} runs in turns; {machine['cpu']}, {machine['cores']} cores; "
        f"{engine_software(result)}"
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


def _ratio(name: str, base: float, own: float) -> str:
    return line(name, f"{base:,.2f}", f"{own:,.2f}", f"{own / base:.3f}")


def cpu_kernels_table(result: Result) -> str:
    """Each batch size's fastest 2:4 kernel against torch's products and our own dense one."""
    times_of = ("fastest 2:4 kernel", "ms", "torch, float32 or bfloat16, ms")
    lines = [head("shape", "batch", *times_of, "gain", "gain over our dense kernel")]
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
        f"\nWeights of bfloat16 values, medians of {result['setting']['repeats']} turns in each of "
        f"{result['setting']['processes']} processes; "
        f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"{commit_and_date(machine)}"
    )
    return "\n".join(lines)


def cpu_bf16_kernels_table(result: Result) -> str:
    """How many times as fast as vLLM's dense layer 2:4 is, and what of it is sparsity."""
    return _gains_table(
        result,
        ("cpu_bf16", "cpu_bf16_tiles", "cpu_direct"),
        "vllm_bfloat16",
        {"median against our dense kernel": "cpu_bf16_dense"},
        "Times of vLLM's dense layer over those of the fastest 2:4 kernel",
    )


def cpu_int8_kernels_table(result: Result) -> str:
    """How many times as fast as vLLM's dense int8 layer the int8 kernel is, and as others."""
    return _gains_table(
        result,
        ("cpu_int8",),
        "vllm_int8",
        {
            "median against torch, bfloat16, dense": "torch_bfloat16",
            "median against torch, float32, dense": "torch_float32",
        },
        "Times of vLLM's dense int8 product over those of `cpu_int8`",
    )


def cpu_experts_table(result: Result) -> str:
    """How many times as fast as vLLM's own experts packed ones are, by model and tokens."""
    rows, machine = result["rows"], result["machine"]
    tokens = distinct(row["tokens"] for row in rows)
    lines = [head("experts like those of", "experts", "inputs", "width", *map(str, tokens))]
    for like in distinct(row["shape"]["like"] for row in rows):
        own = [row for row in rows if row["shape"]["like"] == like]
        shape = own[0]["shape"]
        times = [row["milliseconds"] for row in own]
        lines.append(
            line(
                like,
                f"{shape['choices']} of {shape['experts']}",
                str(shape["hidden"]),
                str(shape["width"]),
                *(f"{each['vllm'] / each['packed']:.2f}" for each in times),
            )
        )
    worst = max(row["difference"] for row in rows)
    lines.append(
        "\nTimes of vLLM's own experts over those of packed ones, one layer; columns are tokens at "
        f"once; medians of at least 3 turns; outputs differ by at most {worst:.1%}; "
        f"{machine['threads']} thread(s), {processor_and_software(machine)}"
    )
    return "\n".join(lines)


def _gains_table(
    result: Result, own: tuple[str, ...], base: str, others: dict[str, str], what: str
) -> str:
    """By shape and batch, the time of ``base`` over that of the fastest of ``own``."""
    rows = result["rows"]
    batches = distinct(row["batch"] for row in rows)
    shapes = distinct((row["rows"], row["columns"]) for row in rows)

    def gains(base: str, of: list[tuple[int, int]]) -> list[str]:
        found = []
        for batch in batches:
            times = [
                row["milliseconds"]
                for row in rows
                if row["batch"] == batch and (row["rows"], row["columns"]) in of
            ]
            gain = statistics.median(
                each[base] / min(each[name] for name in own if name in each) for each in times
            )
            found.append(f"{gain:.2f}")
        return found

    lines = [head("outputs x inputs", *map(str, batches))]
    for outputs, inputs in shapes:
        lines.append(line(f"{outputs} x {inputs}", *gains(base, [(outputs, inputs)])))
    lines.append(line("median", *gains(base, shapes)))
    lines += [line(label, *gains(other, shapes)) for label, other in others.items()]
    machine, setting = result["machine"], result["setting"]
    lines.append(
        f"\n{what}; columns are tokens at once; medians of {setting['repeats']} turns in each of "
        f"{setting['processes']} processes; {machine['cpu']}, {machine['threads']} thread(s), "
        f"torch {machine['torch']}, {commit_and_date(machine)}"
    )
    return "\n".join(lines)


def tune_table(result: Result) -> str:
    """How many times as fast as vLLM's dense product the chosen kernels are, by batch size."""
    batches = list(result["speedup"])
    lines = [head("layer", "how many", *batches)]
    for layers in result["layers"]:
        gains = [layers["dense_seconds"][b] / layers["seconds"][b] for b in batches]
        cells = [f"{gain:.2f}" for gain in gains]
        lines.append(line(layers["layer"], str(len(layers["names"])), *cells))
    total = sum(len(layers["names"]) for layers in result["layers"])
    cells = [f"{gain:.2f}" for gain in result["speedup"].values()]
    lines.append(line("together", str(total), *cells))
    machine = result["machine"]
    lines.append(
        f"\n`{Path(result['path']).name}`, columns are tokens at once; {machine['cpu']}, "
        f"{machine['cores']} cores, of which vLLM leaves one free; "
        f"{engine_software(result)}"
    )
    return "\n".join(lines)


def served_perplexity_table(result: Result) -> str:
    """Perplexity under vLLM, and how far it is from that of transformers."""
    ways = ("program", "weights stored in", "computed in", "tokens at once")
    lines = [head(*ways, "perplexity", "difference")]
    rows, setting, machine = result["rows"], result["setting"], result["machine"]
    for row in rows:
        at_once = row["tokens_at_once"] or setting["length"]
        lines.append(
            f"| {row['program']} | {row['stored']} | {row['computed']} | {at_once} "
            f"| {row['perplexity']:.4f} | {row['perplexity'] / rows[0]['perplexity'] - 1:+.5%} |"
        )
    lines.append(
        f"\n`{setting['checkpoint']}`, {setting['samples']} windows of {setting['length']} tokens "
        f"of the packaged evaluation text; {processor_and_software(machine)}"
    )
    return "\n".join(lines)


SERVING_TABLES: dict[str, Callable[[Result], str]] = {
    "bench-smollm2-2of4-avx512-bf16": bench_table,
    "bench-smollm2-2of4": bench_table,
    "bench-smollm2-2of4-bf16": bench_table,
    "bench-smollm2-2of4-bf16-avx2": bench_table,
    "bench-smollm2-2of4-amx": bench_table,
    "bench-llama-1b": bench_table,
    "bench-llama-1b-avx512-bf16": bench_table,
    "bench-llama-1b-bfloat16": bench_table,
    "bench-olmoe-avx512-bf16": bench_table,
    "cpu-bf16-kernels": cpu_bf16_kernels_table,
    "cpu-experts": cpu_experts_table,
    "cpu-int8-kernels": cpu_int8_kernels_table,
    "cpu-kernels": cpu_kernels_table,
    "cpu-kernels-avx512": cpu_kernels_table,
    "tune-smollm2-2of4": tune_table,
    "tune-smollm2-2of4-bf16": tune_table,
    "served-perplexity": served_perplexity_table,
}
