"""What do the commands of the README print?

They are run as the README gives them, in an empty folder with a link to the model, and what they
print is kept. The test of documents compares the README with it, line by line::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.readme_commands
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.harness.results import RESULTS, write_result
from sparseserve.errors import SparseServeError

ROOT = Path(__file__).parents[2]
RESULT = RESULTS / "readme-commands.json"
START_SECONDS = 300
STOP_SECONDS = 60


class ReadmeError(SparseServeError, click.ClickException):
    """A command of the README failed."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A command after a ``$``, continued lines joined, and the lines shown below it."""

    command: str
    output: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Printed:
    """A command and the lines it printed; none of a server, which is left to run."""

    command: str
    output: tuple[str, ...]


def shown_commands(page: str) -> list[Shown]:
    """Return the commands that ``page`` shows with what they print."""
    found: list[tuple[str, list[str]]] = []
    for line in re.sub(r" \\\n\s*", " ", page).splitlines():
        if line.startswith("    $ "):
            found.append((line.removeprefix("    $ "), []))
        elif line.startswith("    ") and found:
            found[-1][1].append(line.strip())
        elif line and found:
            break
    return [Shown(command, tuple(output)) for command, output in found]


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


def _run(command: str, folder: Path, servers: ExitStack) -> Printed:
    click.echo(f"$ {command}", err=True)
    if command.startswith("sparseserve serve "):
        servers.enter_context(_server(command, folder))
        return Printed(command, ())
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReadmeError(f"{command}: exit code {done.returncode}: {done.stdout[-2000:]}")
    lines = (line.strip() for line in re.split(r"[\r\n]+", done.stdout))
    return Printed(command, tuple(line for line in lines if line))


@contextmanager
def _server(command: str, folder: Path) -> Iterator[None]:
    found = re.search(r"--port (\d+)", command)
    if found is None:
        raise ReadmeError(f"{command}: names no --port")
    arguments = ["bash", "-c", f"exec {command}"]
    with subprocess.Popen(
        arguments, cwd=folder, env=_environment(), stdout=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(int(found[1]), server)
            yield
        finally:
            server.terminate()
            server.wait(STOP_SECONDS)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise ReadmeError(f"the server on port {port} did not come up") from None
            time.sleep(1)
        else:
            return


def _environment() -> dict[str, str]:
    programs = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


if __name__ == "__main__":
    main()
