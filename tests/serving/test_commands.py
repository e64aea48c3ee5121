"""``sparseserve bench`` and ``sparseserve serve`` as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from sparseserve.cli.bench import bench_command
from sparseserve.serving.engine import Engine, engine_options
from sparseserve.serving.perplexity import engine_perplexity, vllm_perplexity
from sparseserve.serving.served_model import ServedModel
from sparseserve.testing import tiny_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(
    two_four_folder: Callable[..., Path], pack_folder: Callable[[Path], Path]
) -> tuple[Path, Path]:
    """A packed folder and the dense one."""
    dense = two_four_folder("llama")
    return pack_folder(dense), dense


def sparseserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparseserve", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def bench(
    pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """What one run printed, and its standard error."""
    packed, dense = pair
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    result = sparseserve(
        *("bench", str(packed), "--baseline", str(dense), "--json", "-o", str(output)),
        *("--batch-sizes", "1,64", "--input-length", "8,24", "--output-length", "4"),
        *("--repeats", "2", "--samples", "2", "--sequence-length", "32"),
        *("--http", "--concurrency", "1,2", "--request-rate", "20", "--requests", "4"),
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout)
    assert found == json.loads(output.read_text())
    return found, result.stderr


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


def test_bench_measures_prefill_and_decoding_at_every_length_and_batch_size(
    bench: tuple[dict[str, Any], str],
) -> None:
    found, shown = bench
    runs = [(8, 1), (8, 64), (24, 1), (24, 64)]
    for rows in (found["model"]["latency"], found["baseline"]["latency"], found["speedups"]):
        assert [(row["input_length"], row["batch_size"]) for row in rows] == runs
    for row in found["model"]["latency"] + found["baseline"]["latency"]:
        prompt_tokens = row["input_length"] * row["batch_size"]
        # Of two runs, the median is the mean.
        assert row["prefill_tokens_per_second"]["median"] == pytest.approx(
            prompt_tokens / row["ttft_seconds"]["median"], rel=0.5
        )
        assert 0 < row["itl_seconds"]["median"] <= row["itl_seconds"]["p99"]
        assert row["tpot_seconds"]["median"] > 0
        assert row["tokens_per_second"]["median"] > 0
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in found["speedups"])
    assert "24 in, batch 64: prefill, tokens/s" in shown


def test_bench_measures_the_memory_of_both_engines(bench: tuple[dict[str, Any], str]) -> None:
    model, baseline = (bench[0][side]["memory"] for side in ("model", "baseline"))
    parameters = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    # vLLM on a CPU keeps embedding and output head twice; its vocabulary ends at a multiple of 64.
    assert 1 < baseline["weight_bytes"] / (4 * parameters) < 1.6
    assert model["weight_bytes"] < baseline["weight_bytes"]
    for memory in (model, baseline):
        assert 0 < memory["weight_bytes"] + memory["cache_bytes"] < memory["resident_bytes"]


def test_bench_puts_every_level_of_load_on_both_servers(bench: tuple[dict[str, Any], str]) -> None:
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


def test_options_of_load_are_refused_without_http() -> None:
    result = CliRunner().invoke(bench_command, ["one", "--baseline", "other", "--concurrency", "2"])
    assert result.exit_code == 2
    assert "--concurrency needs --http" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "no/such/folder"), "no such folder"),
        (("bench", "no/such/folder", "--baseline", "neither"), "no such folder"),
    ],
)
def test_a_folder_that_is_not_there_is_one_line_and_exit_code_1(
    arguments: tuple[str, ...], message: str
) -> None:
    result = sparseserve(*arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_perplexity_of_windows_as_long_as_the_model_takes(pair: tuple[Path, Path]) -> None:
    packed, dense = pair
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(256, (length,), generator=generator) for length in (256, 40)]
    found = vllm_perplexity(packed, windows, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        total = sum(
            float(
                torch.nn.functional.cross_entropy(
                    model(window[None]).logits[0, :-1].double(), window[1:], reduction="sum"
                )
            )
            for window in windows
        )
    assert found.tokens == 255 + 39
    assert found.perplexity == pytest.approx(torch.tensor(total / 294).exp().item(), rel=1e-5)


def test_an_engine_that_fails_says_why_and_one_that_dies_is_noticed(
    pair: tuple[Path, Path],
) -> None:
    from sparseserve.errors import ServingError

    options = engine_options(ServedModel.open(pair[0]), max_model_len=16, dtype=torch.float32)
    with Engine(options) as engine:
        with pytest.raises(ServingError, match=r"vLLM failed: .*16"):
            engine_perplexity(engine, [torch.arange(40)])
        with pytest.raises(ServingError, match="worker died with exit code 1"):
            engine.generate([[1, 2]], 2)


def test_serve_answers_openai_requests(pair: tuple[Path, Path]) -> None:
    packed, dense = pair
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "sparseserve", "serve", str(packed)),
            *("--", "--host", "127.0.0.1", "--port", port, "--skip-tokenizer-init"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    try:
        assert server.stdout is not None
        log = []
        for line in server.stdout:
            log.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(log[-30:]))
        wait_until_listening(server, port)
        prompt = list(range(10, 40))
        answer = complete(port, {"model": str(packed), "prompt": prompt, "max_tokens": 5})
    finally:
        server.terminate()
        server.communicate(timeout=60)
    model = AutoModelForCausalLM.from_pretrained(dense)
    ids = torch.tensor([prompt])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert answer["choices"][0]["token_ids"] == ids[0, 30:].tolist()


def wait_until_listening(server: subprocess.Popen[str], port: str) -> None:
    """Cross the moment between the server's last line and its first open port."""
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=60).close()
        except ConnectionRefusedError:
            continue
        return
    pytest.fail(f"the server left with exit code {server.returncode}")


def complete(port: str, request: dict[str, Any]) -> dict[str, Any]:
    body = {**request, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        ),
        timeout=120,
    ) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer
