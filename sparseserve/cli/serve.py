"""``sparseserve serve``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sparseserve.cli.options import LOCAL_PATH, say_whether_verified, verify_option


@click.command(
    "serve",
    short_help="Serve a checkpoint with vLLM.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("checkpoint", type=LOCAL_PATH)
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--dry-run", is_flag=True, help="Only print the environment and the command.")
@verify_option
def serve_command(
    checkpoint: Path, vllm_options: tuple[str, ...], dry_run: bool, verify: bool
) -> None:
    """Serve CHECKPOINT with vLLM's own OpenAI-compatible server.

    All other options go to ``vllm serve`` as they are, for example ``-- --port 8001``, and
    override the defaults chosen for this machine. The server answers this machine alone, unless
    ``-- --host ADDRESS`` says otherwise; give ``--api-key`` with it.
    """
    from sparseserve.cli.console import warn_of_missing_kernels
    from sparseserve.serving.launch.command import become, server_command

    command = server_command(checkpoint, vllm_options, verify=verify)
    say_whether_verified(checkpoint, verify)
    variables = [f"{name}={shlex.quote(value)}" for name, value in command.environment.items()]
    line = " ".join([*variables, shlex.join(command.arguments)])
    if dry_run:
        click.echo(line)
        return
    click.echo(line, err=True)
    if command.warning:
        click.echo(f"Warning: {command.warning}", err=True)
    warn_of_missing_kernels()
    become(command)
