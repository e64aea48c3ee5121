"""``sparseserve evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import (
    dtype_option,
    json_option,
    say_whether_verified,
    text_column_option,
    verify_option,
)
from sparseserve.cli.tasks import TaskOptions, score, task_options

if TYPE_CHECKING:
    from sparseserve.evaluation.evaluate import Backend, EvaluationReport
    from sparseserve.evaluation.protocols import Protocol


@click.command("evaluate", short_help="Measure the perplexity of a model, or its task scores.")
@click.argument("model")
@click.option("--text", help="Text file, folder or dataset name; default: packaged text.")
@text_column_option
@click.option(
    "--protocol",
    type=click.Choice(["wikitext2"]),
    help="Windows as in published tables: the whole --text (default: WikiText-2's test split, from "
    "the hub), tokenised once, in windows of 2048.",
)
@click.option("--samples", type=int, help="Windows, spread over the text; default: all.")
@click.option(
    "--sequence-length",
    type=int,
    help="Tokens per window; default: at most 1024, or what the protocol says.",
)
@task_options
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model.",
)
@dtype_option("To compute in; auto is the checkpoint's, with vllm what sparseserve serve takes.")
@click.option("--device", help="Where transformers runs: cpu or cuda; default: cuda if any.")
@verify_option
@json_option
def evaluate_command(
    *,
    model: str,
    text: str | None,
    text_column: str | None,
    protocol: Protocol | None,
    samples: int | None,
    sequence_length: int | None,
    scoring: TaskOptions,
    backend: Backend,
    dtype: str,
    device: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, a dense or packed folder or a hub name, or its task scores.

    Text that a checkpoint was calibrated with is refused. With --tasks the answers of MODEL to the
    questions of lm-eval's tasks are scored instead.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from sparseserve.cli.console import quiet_libraries
    from sparseserve.devices import DTYPES, torch_device
    from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate

    scoring.check(
        of_text={
            "--text": text,
            "--text-column": text_column,
            "--protocol": protocol,
            "--samples": samples,
            "--sequence-length": sequence_length,
        }
    )
    quiet_libraries()
    spec = EvaluationSpec(
        text=text,
        text_column=text_column,
        samples=samples,
        sequence_length=sequence_length,
        backend=backend,
        dtype=DTYPES.get(dtype),
        device=torch_device(device),
        verify=verify,
        protocol=protocol,
    )
    if scoring.tasks is not None:
        score(model, scoring, spec, as_json=as_json)
        say_whether_verified(Path(model), verify)
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=None)
        report = evaluate(
            model,
            spec,
            on_window=lambda done, total: bar.update(task, completed=done, total=total),
        )
    say_whether_verified(Path(model), verify)
    if as_json:
        click.echo(json.dumps(asdict(report)))
    else:
        click.echo(_summary(report))


def _summary(report: EvaluationReport) -> str:
    return (
        f"perplexity {report.perplexity:.4f} over {report.tokens:,} tokens "
        f"({report.windows} windows of {report.sequence_length} from {report.text}"
        f"{f' by the protocol {report.protocol}' if report.protocol else ''}; "
        f"{report.backend}, {report.dtype}, {report.seconds:.0f} s)"
    )
