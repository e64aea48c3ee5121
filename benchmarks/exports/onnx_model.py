"""What does the ONNX export of a whole model take, and does it say what the model says?

`sparseserve export --format onnx` runs in a process of its own for each dtype, and checks weights
and logits itself. Then onnxruntime-genai continues some prompts of the packaged text greedily, and
so does transformers in float32 with the same weights; not in bfloat16, which onnxruntime has not
on a CPU. Programs that compute in 16 bits may take another of two nearly equal tokens and go on
from there, so the tokens before the first difference are counted. ::

    python -m benchmarks.exports.onnx_model CHECKPOINT
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import click
import onnxruntime_genai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, write_result
from sparseserve.checkpoint.artifact import Artifact

PROMPT = 24
GENERATED = ("float32", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One export.

    Attributes:
        dtype: Of weights and products.
        seconds: Of the command, from start to end.
        peak_memory_bytes: Largest resident size of its process.
        onnx_bytes: Size of graph and weights.
        pruned: Products whose pattern was verified.
        difference: Of logits, as the manifest has it.
        prompts: How many were continued.
        tokens: By how many tokens each.
        equal_tokens: How many of all these are the model's, before the first that is not.
    """

    dtype: str
    seconds: float
    peak_memory_bytes: int
    onnx_bytes: int
    pruned: int
    difference: float | None
    prompts: int
    tokens: int
    equal_tokens: int | None


def measure(checkpoint: Path, dtype: str, prompts: Sequence[list[int]], tokens: int) -> Row:
    """Export ``checkpoint`` in ``dtype`` and let both programs continue ``prompts``."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "onnx"
        command = [sys.executable, "-m", "sparseserve", "export", str(checkpoint), "-o", str(out)]
        started = time.perf_counter()
        done = subprocess.run([*command, "--format", "onnx", "--dtype", dtype], check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise click.ClickException(f"'{' '.join(command)}' failed with code {done.returncode}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        manifest = Artifact.open(out).manifest
        size = sum(entry.bytes for name, entry in manifest.files.items() if ".onnx" in name)
        equal = None
        if dtype in GENERATED:
            pairs = zip(
                (continued_by_genai(out, prompt, tokens) for prompt in prompts),
                continued(checkpoint, dtype, prompts, tokens),
                strict=True,
            )
            equal = sum(common_start(one, other) for one, other in pairs)
    return Row(
        dtype=dtype,
        seconds=round(seconds, 1),
        peak_memory_bytes=peak,
        onnx_bytes=size,
        pruned=len(manifest.pruned),
        difference=manifest.report["onnx"]["difference"],
        prompts=len(prompts),
        tokens=tokens,
        equal_tokens=equal,
    )


def continued_by_genai(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    longest = len(prompt) + tokens
    parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def continued(
    checkpoint: Path, dtype: str, prompts: Sequence[list[int]], tokens: int
) -> list[list[int]]:
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model = rounded.float().eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def some_prompts(checkpoint: Path, count: int) -> list[list[int]]:
    """Return the first tokens of paragraphs spread over the packaged evaluation text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = (files("sparseserve") / "data" / "evaluation.txt").read_text(encoding="utf-8")
    paragraphs = [part for part in text.split("\n\n") if len(part) > 8 * PROMPT]
    chosen = paragraphs[:: len(paragraphs) // count][:count]
    return [tokenizer(part).input_ids[:PROMPT] for part in chosen]


def onnx_table(result: Result) -> str:
    """One line for each dtype."""
    lines = [
        head("dtype", "time, s", "memory, MiB", "on disk, MiB", "difference of logits", "tokens")
    ]
    for row in result["rows"]:
        total = row["prompts"] * row["tokens"]
        same = "not run" if row["equal_tokens"] is None else f"{row['equal_tokens']} of {total}"
        shown = "not run" if row["difference"] is None else f"{row['difference']:.1e}"
        sizes = (f"{row[key] / 2**20:,.0f}" for key in ("peak_memory_bytes", "onnx_bytes"))
        lines.append(line(f"`{row['dtype']}`", f"{row['seconds']:.0f}", *sizes, shown, same))
    pruned = result["rows"][0]["pruned"]
    lines.append(
        f"\n`{Path(result['setting']['checkpoint']).name}`, {pruned} pruned modules, each "
        f"2:4 in the graph. {processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "float16", "bfloat16"))
@click.option("--prompts", default=8, show_default=True)
@click.option("--tokens", default=32, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    checkpoint: Path, dtypes: tuple[str, ...], prompts: int, tokens: int, output: Path | None
) -> None:
    rows = []
    for dtype in dtypes:
        rows.append(measure(checkpoint, dtype, some_prompts(checkpoint, prompts), tokens))
        click.echo(asdict(rows[-1]))
        setting = {"checkpoint": str(checkpoint), "prompt_tokens": PROMPT}
        write_result(output or RESULTS / "onnx-smollm2.json", setting, rows=rows)


if __name__ == "__main__":
    main()
