"""``sparseserve bench``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from sparseserve.cli.options import (
    LOCAL_PATH,
    check_json_file,
    dtype_option,
    json_file_option,
    json_option,
    print_json,
    text_column_option,
    write_json_file,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sparseserve.serving.measure.latency import LatencyPlan
    from sparseserve.serving.measure.load import LoadPlan

DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_SAMPLES = 8
DEFAULT_CONCURRENCY = "1,4,8"
DEFAULT_REQUESTS = 16

Number = TypeVar("Number", int, float)


@click.command(
    "bench", short_help="Compare a checkpoint with its dense model: quality, speed, memory."
)
@click.argument("checkpoint", type=LOCAL_PATH)
@click.option("--baseline", type=LOCAL_PATH, required=True, help="The dense checkpoint.")
@click.option("--text", help="File, folder or dataset for the perplexity; default: packaged text.")
@text_column_option
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
@click.option("--http", is_flag=True, help="Also put load on two servers, by vLLM's own client.")
@click.option("--concurrency", help="HTTP requests at once.  [default: 1,4,8]")
@click.option("--request-rate", help="HTTP requests a second, such as 0.5,2, at random times.")
@click.option("--requests", type=int, help="HTTP requests at each level.  [default: 16]")
@dtype_option("To compute in; auto is what sparseserve serve takes.")
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Let vLLM compile both models on a CPU, too, which takes minutes.",
)
@json_option
@json_file_option
def bench_command(
    *,
    checkpoint: Path,
    baseline: Path,
    text: str | None,
    text_column: str | None,
    samples: int,
    sequence_length: int | None,
    batch_sizes: str,
    input_lengths: str,
    output_length: int,
    repeats: int,
    http: bool,
    concurrency: str | None,
    request_rate: str | None,
    requests: int | None,
    dtype: str,
    compiled: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compare CHECKPOINT with the dense BASELINE through vLLM: quality, speed, memory and size."""
    from rich.console import Console

    from sparseserve.cli.bench_table import comparison_table, load_table
    from sparseserve.cli.console import quiet_libraries, warn_of_missing_kernels
    from sparseserve.devices import DTYPES
    from sparseserve.serving.launch.requirements import require_vllm
    from sparseserve.serving.measure.comparison import compare
    from sparseserve.serving.measure.latency import LatencyPlan

    plan = LatencyPlan(
        _integers(batch_sizes, "--batch-sizes"),
        _integers(input_lengths, "--input-length"),
        output_length,
        repeats,
    )
    load_plan = _load_plan(plan, http, concurrency, request_rate, requests)
    check_json_file(output)
    quiet_libraries()
    require_vllm("bench")
    warn_of_missing_kernels()
    windows = _windows(checkpoint, baseline, (text, text_column), samples, sequence_length)
    _leave_when_terminated()
    with _progress() as on_progress:
        found = compare(
            checkpoint,
            baseline,
            windows,
            plan,
            load_plan=load_plan,
            dtype=DTYPES.get(dtype),
            compiled=compiled,
            on_progress=on_progress,
        )
    print_json(found.to_json(), as_json=as_json)
    console = Console(stderr=as_json, markup=False)
    console.print(comparison_table(found), highlight=False)
    if found.http:
        console.print(load_table(found.http), highlight=False)
    write_json_file(found.to_json(), as_json=as_json, output=output)


def _load_plan(
    plan: LatencyPlan,
    http: bool,
    concurrency: str | None,
    request_rate: str | None,
    requests: int | None,
) -> LoadPlan | None:
    """Return the levels of load: those of concurrency, then those of requests a second."""
    from sparseserve.serving.measure.load import LoadLevel, LoadPlan

    given = {
        "--concurrency": concurrency,
        "--request-rate": request_rate,
        "--requests": requests,
    }
    if not http:
        if unused := [option for option, value in given.items() if value is not None]:
            raise click.UsageError(f"{unused[0]} needs --http")
        return None
    if concurrency is None and request_rate is None:
        concurrency = DEFAULT_CONCURRENCY
    at_once = _integers(concurrency, "--concurrency") if concurrency else ()
    rates = _numbers(request_rate, "--request-rate", float) if request_rate else ()
    return LoadPlan(
        levels=(
            *(LoadLevel(number, None) for number in at_once),
            *(LoadLevel(None, rate) for rate in rates),
        ),
        input_lengths=plan.input_lengths,
        output_length=plan.output_length,
        requests=DEFAULT_REQUESTS if requests is None else requests,
    )


def _integers(text: str, option: str) -> tuple[int, ...]:
    return _numbers(text, option, int)


def _numbers(text: str, option: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"'{text}' is not a list such as 1,2,4,8", param_hint=option
        ) from error


def _leave_when_terminated() -> None:
    """Make SIGTERM an exit that stops engines and servers on its way, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _windows(
    checkpoint: Path,
    baseline: Path,
    text: tuple[str | None, str | None],
    samples: int,
    sequence_length: int | None,
) -> list[Tensor]:
    """Cut the windows of ``text``, a source and its column."""
    from sparseserve.evaluation.contamination import assert_not_calibration
    from sparseserve.huggingface.opening import open_tokenizer
    from sparseserve.serving.launch.served_model import ServedModel
    from sparseserve.text import evaluation_windows, fit_sequence_length, read_text
    from sparseserve.text.windows import require_known_tokens

    models = [ServedModel.open(folder) for folder in (checkpoint, baseline)]
    limits = [model.max_positions for model in models]
    source = read_text(text[0], column=text[1], packaged="evaluation")
    assert_not_calibration(checkpoint, source)
    length = fit_sequence_length(
        sequence_length,
        limit=min((limit for limit in limits if limit is not None), default=None),
        default=DEFAULT_SEQUENCE_LENGTH,
    )
    tokenizer = open_tokenizer(baseline)
    windows = evaluation_windows(tokenizer, source, sequence_length=length, samples=samples)
    require_known_tokens(source.name, windows, min(model.vocabulary for model in models))
    return windows


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
