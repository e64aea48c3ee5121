"""Can a model be pruned that is several times as large as the memory it is given?

A random model with the decoder layers of Qwen3 1.7B, and more of them, is pruned by
`sparseserve prune-and-export` in a control group of Linux whose memory is limited. The limit counts
what the process has of its own, and the pages of files that it reads and writes; the system drops
those as it needs. Control groups can be made by root, or where a folder of them was handed over::

    python -m benchmarks.quality.larger_than_memory --layers 114 --limit-gib 4
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.random_models import write_random_model
from benchmarks.harness.results import RESULTS, Result, write_result
from benchmarks.quality import layer_memory
from benchmarks.quality.layer_memory import peak_of
from sparseserve.recipe.toml import PRESETS

_GROUPS = Path("/sys/fs/cgroup")
_SIZES = {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151_936}
_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
_SMOKE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
_SMOKE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(layer_memory.Row):
    """One run by a recipe or a method, within the ``limit_bytes`` of its control group."""

    limit_bytes: int


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A model in ``folder`` whose files take ``size`` bytes."""

    folder: Path
    layers: int
    size: int


@contextmanager
def limited(command: list[str], limit: int) -> Iterator[list[str]]:
    """Give the ``command`` that runs ``command`` in a new control group of ``limit`` bytes.

    Raises:
        click.ClickException: The group cannot be made.
    """
    first = _GROUPS / "memory" if (_GROUPS / "memory").is_dir() else _GROUPS
    group = first / f"sparseserve-{time.time_ns()}"
    name = "memory.limit_in_bytes" if first != _GROUPS else "memory.max"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        raise click.ClickException(f"{group}: no control group can be made: {error}") from error
    try:
        enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
        yield ["sh", "-c", enter, str(group), *command]
    finally:
        group.rmdir()


def forget_cached(folder: Path) -> None:
    """Let the system drop the pages of files that were just written.

    Cached pages belong to the control group of the process that first touched them.
    """
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(how: str, model: RandomModel, limit: int, samples: int) -> Row:
    """Prune ``model`` under ``limit``, the dry run too.

    Raises:
        click.ClickException: The run failed.
    """
    with tempfile.TemporaryDirectory(dir=model.folder.parent) as scratch:
        command = [sys.executable, "-m", "sparseserve", "prune-and-export", str(model.folder)]
        command += [
            "-o",
            str(Path(scratch) / "out"),
            "--recipe" if how in PRESETS else "--method",
            how,
        ]
        command += ["--samples", str(samples), "--sequence-length", "256", "--json"]
        forget_cached(model.folder)
        with limited(command, limit) as inside:
            dry = subprocess.run([*inside, "--dry-run"], stdout=subprocess.PIPE, check=True)
            started = time.perf_counter()
            peak = peak_of(inside)
        return Row(
            recipe=how,
            layers=model.layers,
            model_bytes=model.size,
            limit_bytes=limit,
            estimate=json.loads(dry.stdout)["needs"]["memory_bytes"],
            peak_memory_bytes=peak,
            seconds=round(time.perf_counter() - started, 1),
        )


def larger_than_memory_table(result: Result) -> str:
    """Memory by the size of the model."""
    lines = [head("pruned by", "decoder layers", "weights", "limit", "peak", "estimate", "minutes")]
    for row in result["rows"]:
        keys = ("model_bytes", "limit_bytes", "peak_memory_bytes", "estimate")
        sizes = (f"{row[key] / 2**30:.2f} GiB" for key in keys)
        minutes = f"{row['seconds'] / 60:.0f}"
        lines.append(line(f"`{row['recipe']}`", str(row["layers"]), *sizes, minutes))
    lines.append(
        "\nThe limit is that of a control group, and counts pages of files too; the peak is what "
        "the process had of its own. Other programs shared the processor, so the time is at most "
        f"this. {processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.option("--by", multiple=True, default=("fast",), show_default=True, help="Recipe or method.")
@click.option("--layers", multiple=True, type=int, default=(114,), show_default=True)
@click.option("--limit-gib", default=4.0, show_default=True)
@click.option("--samples", default=8, show_default=True)
@click.option("--in", "place", type=click.Path(path_type=Path), help="Folder with much room.")
@click.option("--smoke", is_flag=True, help="A tiny model; writes nothing.")
def main(
    *,
    by: tuple[str, ...],
    layers: tuple[int, ...],
    limit_gib: float,
    samples: int,
    place: Path | None,
    smoke: bool,
) -> None:
    rows = []
    for count in (2,) if smoke else layers:
        sizes = {**_SMOKE, **_SMOKE_HEADS} if smoke else {**_SIZES, **_HEADS}
        settings = {**sizes, "num_hidden_layers": count, "tie_word_embeddings": True}
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            folder = Path(scratch) / "model"
            model = RandomModel(folder, count, write_random_model(folder, **settings))
            for how in by:
                rows.append(measure(how, model, int(limit_gib * 2**30), samples))
                click.echo(json.dumps(asdict(rows[-1])))
    if not smoke:
        setting = {"samples": samples, "sequence_length": 256, **_SIZES}
        write_result(RESULTS / "larger-than-memory.json", setting, rows=rows)


if __name__ == "__main__":
    main()
