"""Does the memory that pruning takes grow with the number of calibration windows?

Each run is `sparseserve prune-and-export` in a process of its own, whose largest resident size the
report states. Only the first decoder layers and the last are pruned; all layers are run, and take
the same memory one after the other, but for the last, which is trained towards predictions. (On
Linux the size of a process starts at its parent's; the parent here holds no more than the model,
which the child loads as well.) ::

    python -m benchmarks.demo.assets smollm2
    OMP_NUM_THREADS=1 python -m benchmarks.quality.calibration_memory demo/models/smollm2-135m
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from benchmarks.harness.markdown import distinct, head, line, pick, processor_and_software
from benchmarks.harness.results import RESULTS, Result, write_result
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.models.loading import load_model
from sparseserve.models.structure import trace_structure
from sparseserve.report import PruneReport
from sparseserve.testing import save_tiny_model

RECIPES = ("default", "fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run: the largest resident size of its process, in bytes."""

    recipe: str
    windows: int
    peak_memory_bytes: int


def measure(
    model: str, recipe: str, windows: int, sequence_length: int, ignored: Sequence[str]
) -> Row:
    """Prune ``model`` but for the modules ``ignored`` matches, and return what that took.

    Raises:
        click.ClickException: The command failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        command = [sys.executable, "-m", "sparseserve", "prune-and-export", model, "-o", str(out)]
        command += ["--recipe", recipe, "--format", "dense", "--samples", str(windows)]
        command += ["--sequence-length", str(sequence_length)]
        command += [part for pattern in ignored for part in ("--ignore", pattern)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise click.ClickException(f"'{' '.join(command)}' failed with code {done.returncode}")
        report = PruneReport.from_json(Artifact.open(out).manifest.report)
    return Row(recipe=recipe, windows=windows, peak_memory_bytes=report.peak_memory_bytes)


def other_layers(model: str, pruned: int) -> tuple[int, list[str]]:
    """Return the bytes of the model's parameters, and patterns of all layers but ``pruned`` ones.

    Those are the first ones and the last.
    """
    loaded = load_model(model).model
    structure = trace_structure(loaded, torch.arange(8))
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    return size, [f"^{layer.name}\\." for layer in structure.layers[pruned - 1 : -1]]


def calibration_memory_table(result: Result) -> str:
    """Peak memory by recipe and number of calibration windows."""
    rows, setting, machine = result["rows"], result["setting"], result["machine"]
    counts = distinct(row["windows"] for row in rows)
    lines = [head("peak memory, MiB", *(f"{count} windows" for count in counts))]
    for recipe in distinct(row["recipe"] for row in rows):
        peaks = [
            pick(rows, "peak_memory_bytes", recipe=recipe, windows=count)[0] for count in counts
        ]
        lines.append(line(f"`{recipe}`", *(f"{peak / 2**20:,.0f}" for peak in peaks)))
    lines.append(
        f"\nLargest resident size of the whole process, of which `{Path(setting['model']).name}`'s "
        f"parameters are {setting['model_bytes'] / 2**20:,.0f} MiB; windows of "
        f"{setting['sequence_length']} tokens, {setting['layers']} decoder layers pruned. "
        f"{processor_and_software(machine)}"
    )
    return "\n".join(lines)


@click.command()
@click.argument("model", default="demo/models/smollm2-135m")
@click.option("--windows", multiple=True, type=int, default=(8, 32, 128), show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--layers", default=3, show_default=True, help="Decoder layers to prune.")
@click.option("--smoke", is_flag=True, help="A tiny model; writes nothing.")
def main(
    *, model: str, windows: tuple[int, ...], sequence_length: int, layers: int, smoke: bool
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        if smoke:
            model, sequence_length, layers = str(save_tiny_model("llama", Path(scratch))), 16, 1
            windows = (2,)
        size, ignored = other_layers(model, layers)
        rows = []
        for recipe in RECIPES:
            for count in windows:
                rows.append(measure(model, recipe, count, sequence_length, ignored))
                click.echo(json.dumps(asdict(rows[-1])))
    if not smoke:
        setting = {
            "model": model,
            "model_bytes": size,
            "sequence_length": sequence_length,
            "layers": layers,
        }
        write_result(RESULTS / "calibration-memory.json", setting, rows=rows)


if __name__ == "__main__":
    main()
