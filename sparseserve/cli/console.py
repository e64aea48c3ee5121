"""What the commands show on standard error, and summaries on standard output."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.layerwise.progress import PruneProgress

if TYPE_CHECKING:
    from sparseserve.workflow.inspection import Inspection
from sparseserve.report import LayerReport, OperatorReport


def quiet_libraries() -> None:
    """Keep libraries from writing progress bars and advice between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|datasets")


def warn_of_missing_kernels() -> None:
    """Say that 2:4 layers will run dense where a processor serves without the compiled kernels."""
    import torch

    from sparseserve.serving.kernels.cpu.library import missing_library

    reason = None if torch.cuda.is_available() else missing_library()
    if reason:
        click.echo(f"warning: 2:4 layers will run dense: {reason}", err=True)


@dataclass(frozen=True, slots=True)
class PruningProgress(PruneProgress):
    """A bar over decoder layers, and one line for each operator."""

    bar: Progress
    task: TaskID

    def stage(self, text: str) -> None:
        """Say what is going on outside the layer loop."""
        self.bar.console.print(text, style="dim", markup=False, highlight=False)

    def layer_started(self, name: str, number: int, total: int) -> None:
        """Move the bar to a layer."""
        self.bar.update(
            self.task, description=name, completed=number - 1, total=total, visible=True
        )

    def operator_pruned(self, report: OperatorReport) -> None:
        """Print an operator's error."""
        rows, columns = report.shape
        self.bar.console.print(
            f"  {report.name}  {rows}x{columns}  relative error {report.relative_error:.4f}"
            f"  {report.seconds:.1f} s",
            markup=False,
            highlight=False,
        )

    def layer_finished(self, report: LayerReport) -> None:
        """Advance the bar."""
        self.bar.advance(self.task)


@contextmanager
def pruning_progress() -> Iterator[PruningProgress]:
    """Show progress on standard error while the block runs."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield PruningProgress(bar, bar.add_task("", total=None, visible=False))


def output_console() -> Console:
    """Return standard output, wide enough for long names where it is a file or a pipe.

    It shows brackets as they are: names and paths come from outside.
    """
    return Console(markup=False, width=None if sys.stdout.isatty() else 200)


def show_artifact(artifact: Artifact, *, as_json: bool) -> None:
    """Print what was made."""
    manifest = artifact.manifest
    if as_json:
        click.echo(json.dumps({"output": str(artifact.path), **manifest.to_json()}))
        return
    table = Table(show_header=False, box=None)
    table.add_row("checkpoint", str(artifact.path))
    table.add_row("format", f"{manifest.format}, pattern {manifest.pattern}")
    table.add_row("pruned", f"{len(manifest.pruned)} linear operators")
    table.add_row("mean relative error", f"{manifest.report['mean_relative_error']:.4f}")
    table.add_row("weights on disk", f"{artifact.weight_bytes / 2**20:,.1f} MiB")
    table.add_row("time", f"{manifest.report['seconds']:.0f} s")
    output_console().print(table, highlight=False)


def tell_of_engine(artifact: Artifact) -> None:
    """Say on standard error what became of TensorRT's engine, if the format is ``tensorrt``."""
    if artifact.manifest.format != "tensorrt":
        return
    from sparseserve.exporters.tensorrt import BUILD_FILE, next_command

    found, folder = artifact.manifest.report["tensorrt"], artifact.path
    if found["engine"] is None:
        click.echo(f"There is no engine: {found['why']}.", err=True)
        click.echo(f"{folder / BUILD_FILE} has the commands that build it; in {folder}:", err=True)
        click.echo(f"  {next_command(folder)}", err=True)
    else:
        click.echo(
            f"TensorRT says that {found['eligible']} pruned modules could run sparse, and that "
            f"{found['picked']} do; sparsity.json has each.",
            err=True,
        )


def print_inspection(found: Inspection) -> None:
    """Print a checkpoint's facts and one line for each matrix."""
    console = output_console()
    if found.manifest:
        manifest = found.manifest
        console.print(
            f"{found.path}: {manifest.format}, {len(manifest.pruned)} operators pruned to "
            f"{manifest.pattern} from {manifest.source}",
            highlight=False,
        )
        console.print(f"recipe {json.dumps(manifest.recipe)}", highlight=False)
    else:
        console.print(f"{found.path}: not written by sparseserve", highlight=False)
    size = f"{found.weight_bytes / 2**20:,.1f} MiB"
    console.print(f"{', '.join(found.formats)}, weights on disk {size}", highlight=False)
    columns = (
        "matrix",
        "dtype",
        "shape",
        "zeros",
        "pattern",
        "kernels for 2:4",
        "outputs",
        "inputs",
    )
    table = Table(*columns, box=None)
    for item in found.matrices:
        axis = {0: " by outputs", 1: "", None: ""}[item.axis]
        table.add_row(
            item.name,
            item.dtype,
            f"{item.shape[0]} x {item.shape[1]}",
            f"{item.sparsity:.1%}",
            f"{item.pattern}{axis}",
            ", ".join(item.kernels),
            _largest(item.output_degrees),
            _largest(item.input_degrees),
        )
    console.print(table, highlight=False)
    if found.fused:
        layers = Table("layer that vLLM runs as one", "2:4", box=None)
        for layer in found.fused:
            layers.add_row(layer.name, f"{layer.two_four} of {layer.modules} modules")
        console.print(layers, highlight=False)


def _largest(degrees: Sequence[int]) -> str:
    return f"up to {max(degrees)}" if degrees else "no"
