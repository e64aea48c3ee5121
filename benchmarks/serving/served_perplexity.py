"""Does a packed checkpoint lose anything on its way through vLLM and our kernels?

The perplexity of one checkpoint on the same windows: unpacked, under transformers in float32;
packed, under vLLM, with whole windows at once, which the kernels for prompts compute, and 16 tokens
at once, which those for decoding do; the same with all weights rounded to bfloat16, computed in
float32 and in bfloat16::

    make demo
    python -m benchmarks.serving.served_perplexity demo/smollm2-135m-2of4
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.harness.results import RESULTS, write_result
from sparseserve.cli.console import quiet_libraries
from sparseserve.devices import dtype_name
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.huggingface.opening import open_tokenizer
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options
from sparseserve.serving.measure.perplexity import engine_perplexity
from sparseserve.text import evaluation_windows, read_text
from sparseserve.workflow.run import export

DECODED = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One way to compute it; ``tokens_at_once`` is 0 where windows are computed whole."""

    program: str
    stored: str
    computed: str
    tokens_at_once: int
    perplexity: float


def rows(checkpoint: Path, spec: EvaluationSpec) -> Iterator[Row]:
    """Measure, the reference first."""
    found = evaluate(str(checkpoint), spec)
    own = _stored(checkpoint)
    yield Row("transformers", own, "float32", 0, found.perplexity)
    windows = _windows(checkpoint, spec)
    for tokens in (0, DECODED):
        yield _served(checkpoint, windows, torch.float32, tokens)
    with tempfile.TemporaryDirectory() as scratch:
        narrow = export(checkpoint, Path(scratch) / "narrow", "packed24", torch.bfloat16).path
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (0, DECODED):
                yield _served(narrow, windows, dtype, tokens)


def _served(checkpoint: Path, windows: list[Tensor], dtype: torch.dtype, tokens: int) -> Row:
    options = engine_options(
        ServedModel.open(checkpoint),
        max_model_len=max(map(len, windows)) + 1,
        prompt_tokens=tokens or max(map(len, windows)),
        dtype=dtype,
    )
    with Engine(options) as engine:
        found = engine_perplexity(engine, windows)
    computed = dtype_name(dtype)
    return Row("vllm", _stored(checkpoint), computed, tokens, found.perplexity)


def _stored(checkpoint: Path) -> str:
    return ServedModel.open(checkpoint).dtype


def _windows(checkpoint: Path, spec: EvaluationSpec) -> list[Tensor]:
    assert spec.sequence_length is not None
    return evaluation_windows(
        open_tokenizer(checkpoint),
        read_text(spec.text, packaged="evaluation"),
        sequence_length=spec.sequence_length,
        samples=spec.samples,
    )


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--samples", default=8, show_default=True, help="Windows.")
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--result", default="served-perplexity.json", show_default=True)
def main(checkpoint: Path, samples: int, sequence_length: int, result: str) -> None:
    """Measure the packed CHECKPOINT, a folder."""
    quiet_libraries()
    spec = EvaluationSpec(samples=samples, sequence_length=sequence_length, dtype=torch.float32)
    found = []
    for row in rows(checkpoint, spec):
        click.echo(str(row), err=True)
        found.append(row)
    setting = {"checkpoint": checkpoint.name, "samples": samples, "length": sequence_length}
    write_result(RESULTS / result, setting, rows=found)


if __name__ == "__main__":
    main()
