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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.demo.models import MODELS, fetch_gguf, fetch_model
from benchmarks.harness.results import RESULTS, write_result
from benchmarks.peers.dense_int8 import write_dense_int8
from benchmarks.peers.llamacpp import LlamaCpp, quantized, running
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


@dataclass(frozen=True, slots=True)
class Kind:
    """A program and a form of the weights.

    Attributes:
        program: ``llama.cpp``, ``vLLM`` or ``vLLM with sparseserve``.
        weights: Their form.
        dtype: That vLLM computes in; None for llama.cpp.
    """

    program: str
    weights: str
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.program}, {self.weights}"


LLAMA, VLLM, OURS = "llama.cpp", "vLLM", "vLLM with sparseserve"
DENSE_INT8 = Kind(VLLM, "dense, int8 (W8A8)", torch.bfloat16)
INT8 = Kind(OURS, "2:4, int8", torch.bfloat16)
KINDS = (
    *(Kind(LLAMA, weights) for weights in ("F16", "BF16", "Q8_0", "Q4_0")),
    Kind(VLLM, "dense, float32", torch.float32),
    Kind(OURS, "2:4, float32", torch.float32),
    Kind(VLLM, "dense, bfloat16", torch.bfloat16),
    Kind(OURS, "2:4, bfloat16", torch.bfloat16),
    DENSE_INT8,
    INT8,
)


@dataclass(frozen=True, slots=True)
class System:
    """One way to serve the model.

    Attributes:
        kind: What serves it.
        folder: Folder or file of the model.
        threads: That llama.cpp computes with; None is what vLLM's server takes.
    """

    kind: Kind
    folder: Path
    threads: int | None = None

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
    if system.kind.dtype is None:
        with running(
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
        dtype=system.kind.dtype,
        threads_of_server=True,
    )


@dataclass(frozen=True, slots=True)
class Forms:
    """Makes the forms of a model.

    Attributes:
        name: Of the model in ``benchmarks.demo.assets``.
        packed: Its 2:4 checkpoint.
        scratch: Where to put what is made.
    """

    name: str
    packed: Path
    scratch: Path

    def of(self, kind: Kind) -> Path:
        """Make the form that ``kind`` serves."""
        if kind.program == LLAMA:
            gguf = self.scratch / f"{MODELS[self.name].folder}.gguf"
            if not gguf.exists():
                fetch_gguf(MODELS[self.name], self.scratch)
            return quantized(gguf, kind.weights, self.scratch / f"{kind.weights}.gguf")
        if kind.program == VLLM:
            dense = fetch_model(MODELS[self.name], Path("demo"))
            if kind != DENSE_INT8:
                return dense
            operators = frozenset(module for module, _ in plan(Job(str(dense))).operators)
            return write_dense_int8(dense, self.scratch / "dense-int8", operators)
        return export_packed24(
            Artifact.open(self.packed),
            self.scratch / str(kind),
            torch.bfloat16,
            quantization=Quantization(to="int8") if kind == INT8 else None,
        ).path

    def systems(self, kinds: Sequence[Kind], threads: Sequence[int]) -> Iterator[System]:
        """Make and yield every system; llama.cpp has one for each of ``threads``."""
        for kind in kinds:
            folder = self.of(kind)
            for count in threads if kind.program == LLAMA else (None,):
                yield System(kind, folder, count)


def measure(
    every: list[System], windows: list[Tensor], latencies: LatencyPlan, vocabulary: int
) -> list[dict[str, Any]]:
    """Start all systems, measure them in turns, and return what was found, as JSON data."""
    with ExitStack() as stack:
        engines, memories = [], []
        perplexities: dict[Kind, float] = {}
        for system in every:
            click.echo(f"starting {system.kind}", err=True)
            engine, memory = stack.enter_context(started(system, latencies, len(windows[0])))
            engines.append(engine)
            memories.append(memory)
            if system.kind not in perplexities:
                perplexities[system.kind] = engine_perplexity(engine, windows).perplexity
        click.echo("measuring in turns", err=True)
        measured = measure_latency(engines, latencies, vocabulary)
    return [
        {
            "program": system.kind.program,
            "weights": system.kind.weights,
            "threads": system.threads,
            "disk_bytes": system.disk_bytes,
            "memory_bytes": memory,
            "perplexity": perplexities[system.kind],
            "latency": [row.to_json() for row in rows],
            **_rates(rows),
        }
        for system, memory, rows in zip(every, memories, measured, strict=True)
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
@click.option("--only", multiple=True, help="A system, such as 'llama.cpp, Q8_0'; default: all.")
@click.option("--threads", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(
    *,
    name: str,
    packed: Path,
    result: str,
    text: str | None,
    windows: int,
    only: tuple[str, ...],
    threads: tuple[int, ...],
    repeats: int,
) -> None:
    """Serve the model NAME in every way, PACKED being its 2:4 checkpoint."""
    if unknown := set(only) - set(map(str, KINDS)):
        raise click.UsageError(f"--only {min(unknown)}: not one of {'; '.join(map(str, KINDS))}")
    kinds = [kind for kind in KINDS if not only or str(kind) in only]
    quiet_libraries()
    latencies = LatencyPlan(batch_sizes=(1, 8), repeats=repeats)
    tokenizer = open_tokenizer(packed)
    source = read_text(text, packaged="evaluation")
    chosen = evaluation_windows(tokenizer, source, sequence_length=_WINDOW, samples=windows)
    with tempfile.TemporaryDirectory(dir="demo") as scratch:
        every = list(Forms(name, packed, Path(scratch)).systems(kinds, threads))
        vocabulary = ServedModel.open(packed).vocabulary
        found = measure(every, chosen, latencies, vocabulary)
    setting = {"model": name, "text": text or "packaged", "windows": windows, **asdict(latencies)}
    write_result(RESULTS / result, setting, systems=found)


if __name__ == "__main__":
    main()
