"""Two servers under concurrent HTTP load, by vLLM's own benchmark client.

Every level of load is put on one server, then on the other, and the next level the other way
round; the server that waits its turn takes no time of the processor.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from sparseserve.errors import ServingError
from sparseserve.serving.launch.child import Child, python_module
from sparseserve.serving.launch.command import LOCAL_HOST
from sparseserve.serving.launch.policy import GPU_FRACTION_OF_TWO
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import engine_options
from sparseserve.serving.measure.http_server import HttpServer
from sparseserve.serving.measure.load import Load, LoadLevel, LoadPlan, LoadRow
from sparseserve.serving.measure.load_client import DONE

_CLIENT = "sparseserve.serving.measure.load_client"
_WARMUPS = 2
# A tokenizer may add tokens to the prompts.
_SPARE_TOKENS = 16

_Run = tuple[HttpServer, int, LoadLevel]


def compare_load(
    model: ServedModel,
    baseline: ServedModel,
    plan: LoadPlan,
    dtype: torch.dtype | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    compiled: bool = False,
) -> tuple[LoadRow, ...]:
    """Serve both checkpoints and put every level of ``plan`` on both, in turns.

    Args:
        model: The sparse checkpoint.
        baseline: What it is compared with; both use its tokenizer, and so get the same prompts.
        plan: What to run.
        dtype: Of both servers; None is the checkpoint's where the machine has it, else float32.
        on_progress: Told what is going on, and how far it is, as (what, done, total).
        compiled: Whether vLLM compiles both models on a CPU, too.

    Raises:
        ServingError: A server cannot be started or ended, or requests failed.
        MissingExtraError: vLLM is not installed.
    """
    tokenizer = baseline.folder
    done, total = 0, 2 * plan.runs

    def count() -> None:
        nonlocal done
        done += 1
        on_progress("HTTP load, in turns", done, total)

    on_progress("starting servers", 0, 2)
    with _server(model, tokenizer, plan, dtype, compiled=compiled) as sparse:
        on_progress("starting servers", 1, 2)
        with _server(baseline, tokenizer, plan, dtype, compiled=compiled) as dense:
            on_progress("starting servers", 2, 2)
            on_progress("HTTP load, in turns", done, total)
            return measure_load(sparse, dense, tokenizer, plan, count)


def _server(
    model: ServedModel,
    tokenizer: Path,
    plan: LoadPlan,
    dtype: torch.dtype | None,
    *,
    compiled: bool,
) -> HttpServer:
    longest = max(plan.input_lengths) + plan.output_length + _SPARE_TOKENS
    options = engine_options(
        model,
        max_model_len=min(longest, model.max_positions or longest),
        max_num_seqs=plan.most_at_once,
        dtype=dtype,
    )
    return HttpServer(
        model.folder,
        (
            *("--tokenizer", str(tokenizer), "--dtype", options.dtype),
            *("--max-model-len", str(options.max_model_len)),
            *("--max-num-seqs", str(options.max_num_seqs)),
            *("--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes)),
            *("--gpu-memory-utilization", str(GPU_FRACTION_OF_TWO)),
            # The client warms up with the first of its prompts.
            *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
            *(("--no-enforce-eager",) if compiled else ()),
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
        tokenizer: Folder of the tokenizer of both.
        plan: What to run.
        on_run: Told after every run.

    Raises:
        ServingError: A server ended, or requests failed.
    """
    levels = list(product(plan.input_lengths, plan.levels))
    runs = [
        (server, length, level)
        for number, (length, level) in enumerate(levels)
        for server in ((model, baseline) if number % 2 == 0 else (baseline, model))
    ]
    with tempfile.TemporaryDirectory() as place:
        results = [Path(place) / f"result-{number}.json" for number in range(len(runs))]
        jobs = [
            client_options(run, tokenizer, plan, result)
            for run, result in zip(runs, results, strict=True)
        ]
        _run_client(jobs, runs, on_run)
        loads = [Load.of(json.loads(result.read_text(encoding="utf-8"))) for result in results]
    found = dict(zip(runs, loads, strict=True))
    return tuple(
        LoadRow(length, level, found[model, length, level], found[baseline, length, level])
        for length, level in levels
    )


def client_options(run: _Run, tokenizer: Path, plan: LoadPlan, result: Path) -> tuple[str, ...]:
    """Return the options of ``vllm bench serve`` that put one level of load on one server."""
    server, input_length, level = run
    options = [
        *("--host", LOCAL_HOST, "--port", str(server.port), "--model", str(server.folder)),
        *("--tokenizer", str(tokenizer), "--dataset-name", "random", "--seed", str(plan.seed)),
        *("--num-prompts", str(plan.requests), "--random-input-len", str(input_length)),
        *("--random-output-len", str(plan.output_length), "--ignore-eos", "--temperature", "0"),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"),
        # Memory and kernels of a batch of this size are used once before anything counts.
        *("--num-warmups", str(level.concurrency or _WARMUPS), "--disable-tqdm"),
        *("--save-result", "--save-detailed", "--result-filename", str(result)),
    ]
    if level.concurrency is not None:
        options += ["--max-concurrency", str(level.concurrency)]
    if level.request_rate is not None:
        options += ["--request-rate", str(level.request_rate)]
    return tuple(options)


def _run_client(
    jobs: Sequence[Sequence[str]], runs: Sequence[_Run], on_run: Callable[[], None]
) -> None:
    with _client(jobs) as client:
        for server, length, level in runs:
            answer = client.answer()
            if answer != DONE:
                server.require_running()
                answer = answer or f"it died; its last words: {client.last_words()}"
                raise ServingError(
                    f"{server.folder}: vLLM's benchmark client failed at {level}, "
                    f"{length} tokens in: {answer}"
                )
            on_run()


@contextlib.contextmanager
def _client(jobs: Sequence[Sequence[str]]) -> Iterator[Child]:
    with tempfile.NamedTemporaryFile(mode="w", suffix=".json") as file:
        json.dump(jobs, file)
        file.flush()
        with Child((*python_module(_CLIENT), file.name), answers=True) as client:
            yield client
