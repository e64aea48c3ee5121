"""Two servers under concurrent HTTP load, by vLLM's own benchmark client.

Every level of load is put on one server, then on the other, and the next level the other way
round; the server that waits its turn takes no time of the processor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from sparseserve.errors import ServingError
from sparseserve.serving.engine import EngineOptions
from sparseserve.serving.http_server import HOST, HttpServer
from sparseserve.serving.load import Load, LoadLevel, LoadPlan, LoadRow
from sparseserve.serving.process_log import last_words

# Of a GPU's memory, so that a second server beside this one passes vLLM's own check.
_GPU_SHARE = 0.45
_WARMUPS = 2


def load_server(options: EngineOptions, tokenizer: Path) -> HttpServer:
    """Return a server of ``options.model``, as ``sparseserve serve`` starts it.

    Args:
        options: Its cache, the longest sequence, how many at once, and the dtype are the server's.
        tokenizer: Folder of the tokenizer both sides use, so that both get the same prompts.

    Raises:
        ServingError: The folder or the installation cannot be served.
        MissingExtraError: vLLM is not installed.
    """
    return HttpServer(
        Path(options.model),
        (
            *("--tokenizer", str(tokenizer), "--dtype", options.dtype),
            *("--max-model-len", str(options.max_model_len)),
            *("--max-num-seqs", str(options.max_num_seqs)),
            *("--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes)),
            *("--gpu-memory-utilization", str(_GPU_SHARE)),
            # The client warms up with the first of its prompts.
            *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
        ),
    )


def measure_load(
    model: HttpServer,
    baseline: HttpServer,
    tokenizer: Path,
    plan: LoadPlan,
    on_run: Callable[[], None] = lambda: None,
) -> tuple[LoadRow, ...]:
    """Put every level of ``plan`` on both servers, in turns.

    Args:
        model: Serves the sparse checkpoint.
        baseline: Serves what it is compared with.
        tokenizer: Folder of the tokenizer both use, so that both get the same prompts.
        plan: What to run.
        on_run: Told after every run.

    Raises:
        ServingError: A server ended, or requests failed.
    """
    rows = []
    for number, (length, level) in enumerate(product(plan.input_lengths, plan.levels)):
        turns = [model, baseline] if number % 2 == 0 else [baseline, model]
        found: dict[HttpServer, Load] = {}
        for server in turns:
            found[server] = _run_client(server, tokenizer, plan, length, level)
            on_run()
        rows.append(LoadRow(length, level, found[model], found[baseline]))
    return tuple(rows)


def client_options(plan: LoadPlan, input_length: int, level: LoadLevel) -> tuple[str, ...]:
    """Return what ``vllm bench serve`` is to send."""
    options = [
        *("--dataset-name", "random", "--seed", str(plan.seed)),
        *("--num-prompts", str(plan.requests), "--random-input-len", str(input_length)),
        *("--random-output-len", str(plan.output_length), "--ignore-eos", "--temperature", "0"),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"),
        # Memory and kernels of a batch of this size are used once before anything counts.
        *("--num-warmups", str(level.concurrency or _WARMUPS), "--disable-tqdm"),
    ]
    if level.concurrency is not None:
        options += ["--max-concurrency", str(level.concurrency)]
    if level.request_rate is not None:
        options += ["--request-rate", str(level.request_rate)]
    return tuple(options)


def _run_client(
    server: HttpServer, tokenizer: Path, plan: LoadPlan, input_length: int, level: LoadLevel
) -> Load:
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile(mode="w+") as log:
        result = Path(place) / "result.json"
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "sparseserve.serving.load_client"),
                *("--host", HOST, "--port", str(server.port), "--model", str(server.folder)),
                *("--tokenizer", str(tokenizer), "--save-result", "--save-detailed"),
                *("--result-filename", str(result)),
                *client_options(plan, input_length, level),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if finished.returncode or not result.is_file():
            server.require_running()
            raise ServingError(
                f"{server.folder}: vLLM's benchmark client failed at {level} with exit code "
                f"{finished.returncode}; its last words: {last_words(log)}"
            )
        return _load(server, level, json.loads(result.read_text(encoding="utf-8")))


def _load(server: HttpServer, level: LoadLevel, result: Mapping[str, Any]) -> Load:
    failed = int(result["failed"])
    if failed:
        server.require_running()
        reasons: list[str] = [error for error in result["errors"] if error]
        last_line = (reasons or ["no reason given"])[0].strip().splitlines()[-1]
        raise ServingError(
            f"{server.folder}: {failed} of {failed + int(result['completed'])} requests failed at "
            f"{level}: {last_line}"
        )
    return Load.of(result)
