"""``sparseserve bench`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sparseserve.cli.bench import bench_command
from sparseserve.testing import tiny_model
from tests.serving.command import sparseserve

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def run_bench(pair: tuple[Path, Path], output: Path, *more: str) -> tuple[dict[str, Any], str]:
    """What one run printed, and its standard error."""
    packed, dense = pair
    result = sparseserve(
        *("bench", str(packed), "--baseline", str(dense), "--json", "-o", str(output)),
        *("--output-length", "4", "--samples", "2", "--sequence-length", "32"),
        # Where a processor has bfloat16, vLLM would compute in it.
        *("--dtype", "float32"),
        *more,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout)
    assert found == json.loads(output.read_text())
    return found, result.stderr


@pytest.fixture(scope="module")
def bench(
    pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    plan = ("--batch-sizes", "1,64", "--input-length", "8,24", "--repeats", "2")
    return run_bench(pair, output, *plan)


@pytest.mark.further  # the commands of the README run bench, too
def test_bench_tells_what_it_measured_and_where(
    bench: tuple[dict[str, Any], str], pair: tuple[Path, Path]
) -> None:
    found, shown = bench
    for side, folder in zip(("model", "baseline"), pair, strict=True):
        assert found[side]["path"] == str(folder)
        assert found[side]["weight_bytes"] == (folder / "model.safetensors").stat().st_size
        assert found[side]["tokens"] == 2 * 31
    # The same weights in two forms: only rounding may tell them apart.
    assert found["perplexity_ratio"] == pytest.approx(1, rel=1e-5)
    assert found["machine"]["cores"] >= 1
    assert {"python", "torch", "sparseserve"} <= set(found["versions"])
    assert found["plan"]["repeats"] == 2
    assert "perplexity" in shown


@pytest.mark.further  # the commands of the README run bench, too
def test_bench_measures_prefill_and_decoding_at_every_length_and_batch_size(
    bench: tuple[dict[str, Any], str],
) -> None:
    found, shown = bench
    runs = [(8, 1), (8, 64), (24, 1), (24, 64)]
    for rows in (found["model"]["latency"], found["baseline"]["latency"], found["speedups"]):
        assert [(row["input_length"], row["batch_size"]) for row in rows] == runs
    for row in found["model"]["latency"] + found["baseline"]["latency"]:
        prompt_tokens = row["input_length"] * row["batch_size"]
        # Of two runs, the median is the mean; by Jensen's inequality it is no less than this.
        assert row["prefill_tokens_per_second"]["median"] >= 0.999 * (
            prompt_tokens / row["ttft_seconds"]["median"]
        )
        assert 0 < row["itl_seconds"]["median"] <= row["itl_seconds"]["p99"]
        assert row["tpot_seconds"]["median"] > 0
        assert row["tokens_per_second"]["median"] > 0
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in found["speedups"])
    assert "24 in, batch 64: prefill, tokens/s" in shown


@pytest.mark.further  # the commands of the README run bench, too
def test_bench_measures_the_memory_of_both_engines(bench: tuple[dict[str, Any], str]) -> None:
    model, baseline = (bench[0][side]["memory"] for side in ("model", "baseline"))
    parameters = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    # vLLM on a CPU keeps embedding and output head twice; its vocabulary ends at a multiple of 64.
    assert 1 < baseline["weight_bytes"] / (4 * parameters) < 1.6
    assert model["weight_bytes"] < baseline["weight_bytes"]
    for memory in (model, baseline):
        assert 0 < memory["weight_bytes"] + memory["cache_bytes"] < memory["resident_bytes"]


@pytest.mark.further
def test_bench_puts_every_level_of_load_on_both_servers(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = ("--batch-sizes", "1", "--input-length", "8,24", "--repeats", "1", "--http")
    http = ("--concurrency", "1,2", "--request-rate", "20", "--requests", "2")
    bench = run_bench(pair, tmp_path / "bench.json", *plan, *http)
    rows = bench[0]["http"]["rows"]
    levels = [(1, None), (2, None), (None, 20.0)]
    assert [(row["input_length"], row["concurrency"], row["request_rate"]) for row in rows] == [
        (length, *level) for length in (8, 24) for level in levels
    ]
    for load in (row[side] for row in rows for side in ("model", "baseline")):
        # Every request ended with all of its tokens.
        assert load["tokens_per_second"] == pytest.approx(4 * load["requests_per_second"])
        for time in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert 0 < load[time] <= load[f"p99_{time}"]
    assert "24 in, concurrency 2: TTFT, p99, ms" in bench[1]


@pytest.mark.further
def test_compiled_models_compute_what_others_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = ("--batch-sizes", "1", "--input-length", "8", "--repeats", "1")
    eager, _ = run_bench(pair, tmp_path / "eager.json", *plan)
    compiled, _ = run_bench(pair, tmp_path / "compiled.json", *plan, "--compile")
    for side in ("model", "baseline"):
        assert eager[side]["engine"]["enforce_eager"]
        assert not compiled[side]["engine"]["enforce_eager"]
        assert compiled[side]["perplexity"] == pytest.approx(eager[side]["perplexity"], rel=1e-5)


def test_options_of_load_are_refused_without_http() -> None:
    result = CliRunner().invoke(bench_command, ["one", "--baseline", "other", "--concurrency", "2"])
    assert result.exit_code == 2
    assert "--concurrency needs --http" in result.stderr
