"""The command group, and the one place where errors become exit codes.

Exit code 0 is success, 1 a ``SparseServeError`` in one line on standard error, 2 wrong usage.
"""

from __future__ import annotations

import sys

import click

from sparseserve.cli.bench import bench_command
from sparseserve.cli.convert import convert_command
from sparseserve.cli.evaluate import evaluate_command
from sparseserve.cli.export import export_command
from sparseserve.cli.inspect import inspect_command
from sparseserve.cli.prune import prune_command
from sparseserve.cli.report import report_command
from sparseserve.cli.sensitivity import sensitivity_command
from sparseserve.cli.serve import serve_command
from sparseserve.cli.tune import tune_command
from sparseserve.cli.verify import verify_command
from sparseserve.errors import SparseServeError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sparseserve")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Prune language models to 2:4 sparsity, export them and serve them."""


for _command in (
    prune_command,
    sensitivity_command,
    evaluate_command,
    bench_command,
    tune_command,
    serve_command,
    export_command,
    convert_command,
    verify_command,
    report_command,
    inspect_command,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line."""
    try:
        cli.main(prog_name="sparseserve")
    except SparseServeError as error:
        if "--debug" in sys.argv:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
