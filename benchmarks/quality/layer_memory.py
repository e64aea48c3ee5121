"""Does the memory that pruning takes grow with the number of decoder layers?

Random models of one shape and more and more layers are pruned by `sparseserve prune-and-export` in
a process of its own. Ten times a second the process is asked for its anonymous memory, that is, for
what is not mapped from a file and cannot be dropped. The estimate is what `--dry-run` says. ::

    python -m benchmarks.quality.layer_memory --recipe fast
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.random_models import write_random_model
from benchmarks.harness.results import RESULTS, Result, write_result
from sparseserve.testing import TINY_VOCABULARY

_POLL_SECONDS = 0.1
SIZES = ("model_bytes", "peak_memory_bytes", "estimate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run; sizes in bytes.

    Attributes:
        recipe: How the model was pruned.
        layers: How many decoder layers it has.
        model_bytes: Its weights on the disk.
        estimate: What the dry run says.
        peak_memory_bytes: Largest anonymous memory of the process.
        seconds: Wall time.
    """

    recipe: str
    layers: int
    model_bytes: int
    estimate: int
    peak_memory_bytes: int
    seconds: float


def measure(
    recipe: str, layers: int, sizes: tuple[int, int], samples: int, sequence_length: int
) -> Row:
    """Prune a random model and watch the process.

    Raises:
        click.ClickException: The command failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        hidden, intermediate = sizes
        size = write_random_model(
            model,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            vocab_size=TINY_VOCABULARY,
        )
        command = [sys.executable, "-m", "sparseserve", "prune-and-export", str(model)]
        command += ["-o", str(Path(scratch) / "out"), "--recipe", recipe, "--json"]
        command += ["--samples", str(samples), "--sequence-length", str(sequence_length)]
        dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
        started = time.perf_counter()
        peak = peak_of(command)
        return Row(
            recipe=recipe,
            layers=layers,
            model_bytes=size,
            estimate=json.loads(dry.stdout)["needs"]["memory_bytes"],
            peak_memory_bytes=peak,
            seconds=round(time.perf_counter() - started, 1),
        )


def peak_of(command: list[str]) -> int:
    """Run ``command`` and return the largest anonymous memory it had, in bytes.

    Raises:
        click.ClickException: It failed.
    """
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        while run.poll() is None:
            status = Path(f"/proc/{run.pid}/status").read_text(encoding="utf-8")
            found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(_POLL_SECONDS)
        assert run.stderr is not None
        if run.returncode:
            raise click.ClickException(f"{' '.join(command)}: {run.stderr.read()[-500:]}")
    return peak


def layer_memory_table(result: Result) -> str:
    """Peak memory by the number of decoder layers."""
    setting = result["setting"]
    lines = [head("recipe", "decoder layers", "weights", "peak", "estimate")]
    for row in result["rows"]:
        sizes = (f"{row[key] / 2**20:,.0f} MiB" for key in SIZES)
        lines.append(line(f"`{row['recipe']}`", str(row["layers"]), *sizes))
    lines.append(
        f"\nLargest anonymous memory of the process, Python and libraries included. Llama shape "
        f"{setting['hidden_size']} x {setting['intermediate_size']} in bfloat16, "
        f"{setting['samples']} windows of {setting['sequence_length']} tokens. "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.option("--recipe", "recipes", multiple=True, default=("fast",), show_default=True)
@click.option("--layers", multiple=True, type=int, default=(8, 16, 32), show_default=True)
@click.option("--hidden-size", default=512, show_default=True)
@click.option("--intermediate-size", default=2048, show_default=True)
@click.option("--samples", default=8, show_default=True)
@click.option("--sequence-length", default=128, show_default=True)
@click.option("--smoke", is_flag=True, help="One layer; writes nothing.")
def main(
    *,
    recipes: tuple[str, ...],
    layers: tuple[int, ...],
    hidden_size: int,
    intermediate_size: int,
    samples: int,
    sequence_length: int,
    smoke: bool,
) -> None:
    if smoke:
        layers, hidden_size, intermediate_size = (1,), 64, 128
    rows = []
    for recipe in recipes:
        for count in layers:
            sizes = (hidden_size, intermediate_size)
            rows.append(measure(recipe, count, sizes, samples, sequence_length))
            click.echo(json.dumps(asdict(rows[-1])))
    if not smoke:
        setting = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "samples": samples,
            "sequence_length": sequence_length,
        }
        write_result(RESULTS / "layer-memory.json", setting, rows=rows)


if __name__ == "__main__":
    main()
