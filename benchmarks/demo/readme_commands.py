"""What do the commands of the README print?

They are run as the README gives them, in an empty folder with a link to the model, and what they
print is kept. The test of documents compares the README with it, line by line::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.readme_commands
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.demo.server import running
from benchmarks.harness.results import RESULTS, write_result
from sparseserve.errors import SparseServeError

ROOT = Path(__file__).parents[2]
RESULT = RESULTS / "readme-commands.json"
BASH = "/bin/bash"


class ReadmeError(SparseServeError, click.ClickException):
    """A command of the README failed."""


@dataclass(frozen=True, slots=True)
class ShownCommand:
    """A command, continued lines joined, and the lines it prints; none of a server."""

    command: str
    output: tuple[str, ...]


def shown_commands(page: str) -> list[ShownCommand]:
    """Return the commands that ``page`` shows with what they print."""
    found: list[tuple[str, list[str]]] = []
    for line in re.sub(r" \\\n\s*", " ", page).splitlines():
        if line.startswith("    $ "):
            found.append((line.removeprefix("    $ "), []))
        elif line.startswith("    ") and found:
            found[-1][1].append(line.strip())
        elif line and found:
            break
    return [ShownCommand(command, tuple(output)) for command, output in found]


@click.command()
@click.option("--model", default="demo/models/smollm2-135m", type=click.Path(path_type=Path))
@click.option("--smoke", is_flag=True, help="Only parse the README: is there anything to run?")
def main(model: Path, smoke: bool) -> None:
    """Run the commands and write what they print to benchmarks/results/."""
    shown = shown_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    if smoke:
        click.echo("\n".join(each.command for each in shown))
        return
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        (Path(scratch) / model.name).symlink_to(model.resolve())
        printed = [_run(each.command, Path(scratch), servers) for each in shown]
    write_result(RESULT, {"model": model.name}, commands=printed)


def _run(command: str, folder: Path, servers: ExitStack) -> ShownCommand:
    click.echo(f"$ {command}", err=True)
    if command.startswith("sparseserve serve "):
        servers.enter_context(_server(command, folder))
        return ShownCommand(command, ())
    done = subprocess.run(
        [BASH, "-c", command],
        cwd=folder,
        env={**os.environ, **_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReadmeError(f"{command}: exit code {done.returncode}: {done.stdout[-2000:]}")
    lines = (line.strip() for line in re.split(r"[\r\n]+", done.stdout))
    return ShownCommand(command, tuple(line for line in lines if line))


def _server(command: str, folder: Path) -> AbstractContextManager[str]:
    found = re.search(r"--port (\d+)", command)
    if found is None:
        raise ReadmeError(f"{command}: names no --port")
    program = (BASH, "-c", f"cd {shlex.quote(str(folder))} && exec {command}")
    return running(program, int(found[1]), folder / "serve.log", _environment())


def _environment() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


if __name__ == "__main__":
    main()
