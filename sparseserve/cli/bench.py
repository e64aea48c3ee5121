"""``sparseserve bench``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_SAMPLES = 8


@click.command("bench")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="The dense checkpoint."
)
@click.option("--text", help="File, folder or dataset for the perplexity; default: packaged text.")
@click.option("--samples", type=int, default=DEFAULT_SAMPLES, show_default=True, help="Windows.")
@click.option("--sequence-length", type=int, help="Tokens of each window.")
@click.option("--batch-sizes", default="1,2,4,8", show_default=True, help="Prompts at once.")
@click.option(
    "--input-length",
    "input_lengths",
    default="128",
    show_default=True,
    help="Prompt tokens; several as 128,1024.",
)
@click.option("--output-length", type=int, default=32, show_default=True, help="New tokens.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Measured runs of each.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="To compute in; auto is the checkpoint's, or float32 where the machine has no other.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the JSON here.")
def bench_command(
    *,
    checkpoint: Path,
    baseline: Path,
    text: str | None,
    samples: int,
    sequence_length: int | None,
    batch_sizes: str,
    input_lengths: str,
    output_length: int,
    repeats: int,
    dtype: str,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compare CHECKPOINT with the dense BASELINE through vLLM: quality, speed, memory and size."""
    from rich.console import Console

    from sparseserve.checkpoint import write_json
    from sparseserve.cli.bench_table import comparison_table
    from sparseserve.cli.console import quiet_libraries
    from sparseserve.recipe import DTYPES
    from sparseserve.serving.comparison import compare
    from sparseserve.serving.latency import LatencyPlan
    from sparseserve.serving.requirements import require_vllm

    quiet_libraries()
    require_vllm("bench")
    plan = LatencyPlan(
        _integers(batch_sizes, "--batch-sizes"),
        _integers(input_lengths, "--input-length"),
        output_length,
        repeats,
    )
    windows = _windows(checkpoint, baseline, text, samples, sequence_length)
    with _progress() as on_progress:
        found = compare(
            checkpoint, baseline, windows, plan, dtype=DTYPES.get(dtype), on_progress=on_progress
        )
    if output:
        write_json(output, found.to_json())
    if as_json:
        click.echo(json.dumps(found.to_json()))
    Console(stderr=as_json).print(comparison_table(found), highlight=False)


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"'{text}' is not a list such as 1,2,4,8", param_hint=option
        ) from error


def _windows(
    checkpoint: Path, baseline: Path, text: str | None, samples: int, sequence_length: int | None
) -> list[Tensor]:
    from transformers import AutoTokenizer

    from sparseserve.evaluation import assert_not_calibration
    from sparseserve.serving.served_model import ServedModel
    from sparseserve.text import evaluation_windows, fit_sequence_length, read_text

    limits = [ServedModel.open(folder).max_positions for folder in (checkpoint, baseline)]
    source = read_text(text, packaged="evaluation")
    assert_not_calibration(checkpoint, source)
    length = fit_sequence_length(
        sequence_length,
        limit=min((limit for limit in limits if limit is not None), default=None),
        default=DEFAULT_SEQUENCE_LENGTH,
    )
    tokenizer = AutoTokenizer.from_pretrained(baseline)
    return evaluation_windows(tokenizer, source, sequence_length=length, samples=samples)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show on standard error what is going on, how far it is and how long it took."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)  # type: ignore[arg-type]  # TaskID is an int

        yield on_progress
