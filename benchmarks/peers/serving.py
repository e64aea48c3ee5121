"""What else could a user serve the same model with on this processor, and how fast is it?

llama.cpp with the model in its own forms, vLLM with the dense model in 16 and in 8 bits, and vLLM
with our 2:4 checkpoint in 16 and in 8 bits. All engines are up at once and run in turns, with equal
prompts. vLLM has the threads that its server has, llama.cpp what ``--threads`` says. llama.cpp is
built from source for this processor on the first call::

    python -m benchmarks.demo                    # makes demo/smollm2-135m-2of4
    python -m benchmarks.peers.serving smollm2 demo/smollm2-135m-2of4 \
        --result peers-serving-smollm2.json --text demo/texts/wikipedia-evaluation.txt
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.demo.assets import ASSETS, MODELS, fetch_gguf
from benchmarks.harness.results import RESULTS, write_result
from benchmarks.peers.dense_int8 import write_dense_int8
from benchmarks.peers.llamacpp import LlamaCpp, quantized
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.cli.console import quiet_libraries
from sparseserve.exporters.packed24 import export_packed24
from sparseserve.huggingface.opening import open_tokenizer
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, EngineOptions, engine_options
from sparseserve.serving.measure.latency import BatchLatency, LatencyPlan, measure_latency
from sparseserve.serving.measure.perplexity import engine_perplexity
from sparseserve.text import read_text
from sparseserve.text.windows import evaluation_windows
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan

_WINDOW = 512  # tokens
LLAMA_KINDS = ("F16", "BF16", "Q8_0", "Q4_0")


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve the model.

    Attributes:
        program: ``llama.cpp``, ``vLLM`` or ``vLLM with sparseserve``.
        weights: Their form.
        threads: That it computes with; None is what vLLM's server takes.
        folder: Folder or file of the model.
        dtype: That vLLM computes in; None for llama.cpp.
    """

    program: str
    weights: str
    threads: int | None
    folder: Path
    dtype: torch.dtype | None = None

    @property
    def disk_bytes(self) -> int:
        """Size of its weights on disk."""
        if self.folder.is_file():
            return self.folder.stat().st_size
        return ServedModel.open(self.folder).weight_bytes


@contextmanager
def started(
    system: System, latencies: LatencyPlan, window: int
) -> Iterator[tuple[Engine | LlamaCpp, int]]:
    """Start the engine of ``system``; yield it with the memory that it takes without its cache."""
    largest = max(latencies.batch_sizes)
    length = max(latencies.input_lengths) + latencies.output_length
    if system.dtype is None:
        with LlamaCpp(
            system.folder,
            sequences=largest,
            length=max(length, window),
            threads=system.threads or 1,
        ) as llama:
            llama.generate([[1] * 8], 2)  # pages of the file are read when they are used
            yield llama, llama.resident_bytes()
        return
    with Engine(_vllm_options(system, latencies, length, window)) as engine:
        yield engine, engine.memory.bytes_without_cache


def _vllm_options(
    system: System, latencies: LatencyPlan, length: int, window: int
) -> EngineOptions:
    largest = max(latencies.batch_sizes)
    return engine_options(
        ServedModel.open(system.folder),
        max_model_len=max(window + 1, length),
        max_num_seqs=largest,
        batch_model_len=length,
        prompt_tokens=max(1024, largest * max(latencies.input_lengths)),
        dtype=system.dtype,
        threads_of_server=True,
    )


def systems(name: str, packed: Path, threads: tuple[int, ...], scratch: Path) -> Iterator[System]:
    """Make and yield every system of a model.

    Args:
        name: Of the model in ``benchmarks.demo.assets``.
        packed: Its 2:4 checkpoint.
        threads: Of llama.cpp, one system for each.
        scratch: Where to put what is made.
    """
    dense = ASSETS[name](Path("demo"))[0]
    gguf = fetch_gguf(MODELS[name], scratch)
    for kind in LLAMA_KINDS:
        file = quantized(gguf, kind, scratch / f"{kind}.gguf")
        for count in threads:
            yield System("llama.cpp", kind, count, file)
    operators = frozenset(module for module, _ in plan(Job(str(dense))).operators)
    int8 = write_dense_int8(dense, scratch / "dense-int8", operators)
    artifact = Artifact.open(packed)
    narrow = export_packed24(artifact, scratch / "2of4", torch.bfloat16)
    codes = export_packed24(
        artifact, scratch / "2of4-int8", torch.bfloat16, quantization=Quantization(to="int8")
    )
    for dtype in (torch.float32, torch.bfloat16):
        form = str(dtype).removeprefix("torch.")
        yield System("vLLM", f"dense, {form}", None, dense, dtype)
        yield System("vLLM with sparseserve", f"2:4, {form}", None, narrow.path, dtype)
    yield System("vLLM", "dense, int8 (W8A8)", None, int8, torch.bfloat16)
    yield System("vLLM with sparseserve", "2:4, int8", None, codes.path, torch.bfloat16)


def measure(
    every: list[System], windows: list[Tensor], latencies: LatencyPlan, vocabulary: int
) -> list[dict[str, Any]]:
    """Start all systems, measure them in turns, and return what was found, as JSON data."""
    with ExitStack() as stack:
        engines, memories, perplexities = [], [], []
        for system in every:
            click.echo(f"starting {system.program}, {system.weights}", err=True)
            engine, memory = stack.enter_context(started(system, latencies, len(windows[0])))
            engines.append(engine)
            memories.append(memory)
            perplexities.append(engine_perplexity(engine, windows).perplexity)
        click.echo("measuring in turns", err=True)
        measured = measure_latency(engines, latencies, vocabulary)
    return [
        {
            "program": system.program,
            "weights": system.weights,
            "threads": system.threads,
            "disk_bytes": system.disk_bytes,
            "memory_bytes": memory,
            "perplexity": perplexity,
            "latency": [row.to_json() for row in rows],
            **_rates(rows),
        }
        for system, memory, perplexity, rows in zip(
            every, memories, perplexities, measured, strict=True
        )
    ]


def _rates(rows: tuple[BatchLatency, ...]) -> dict[str, Any]:
    """Return tokens a second: of prompts, one at a time, and new ones by batch size."""
    decoded = {str(row.batch_size): row.batch_size / row.tpot_seconds.median for row in rows}
    return {
        "prompt_tokens_per_second": rows[0].prefill_tokens_per_second.median,
        "new_tokens_per_second": decoded,
    }


@click.command()
@click.argument("name", type=click.Choice(sorted(MODELS)))
@click.argument("packed", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--result", required=True, help="Name of the JSON in benchmarks/results.")
@click.option("--text", help="File whose windows give the perplexity. Default: the packaged text.")
@click.option("--windows", default=16, show_default=True, help=f"Windows of {_WINDOW} tokens.")
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(
    *,
    name: str,
    packed: Path,
    result: str,
    text: str | None,
    windows: int,
    threads: tuple[int, ...],
    repeats: int,
) -> None:
    """Serve the model NAME in every way, PACKED being its 2:4 checkpoint."""
    quiet_libraries()
    latencies = LatencyPlan(batch_sizes=(1, 8), repeats=repeats)
    tokenizer = open_tokenizer(packed)
    source = read_text(text, packaged="evaluation")
    chosen = evaluation_windows(tokenizer, source, sequence_length=_WINDOW, samples=windows)
    with tempfile.TemporaryDirectory(dir="demo") as scratch:
        every = list(systems(name, packed, threads, Path(scratch)))
        vocabulary = ServedModel.open(packed).vocabulary
        found = measure(every, chosen, latencies, vocabulary)
    setting = {"model": name, "text": text or "packaged", "windows": windows, **asdict(latencies)}
    write_result(RESULTS / result, setting, systems=found)


if __name__ == "__main__":
    main()
