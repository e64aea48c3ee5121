"""The page about the benchmarks names every script once, and commands that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`(python -m [^`]+|benchmarks/[^`]+\.sh)`", README)
# peers.compare starts it in another tool's environment; run.sh calls outcomes.
STARTED_BY_OTHERS = {
    "benchmarks.families.serve_forms",
    "benchmarks.peers.llamacpp_worker",
    "benchmarks.peers.worker",
    "benchmarks.gpu.outcomes",
}


def scripts() -> set[str]:
    """Return the modules that can be run, and the shell scripts."""
    found = set()
    for path in BENCHMARKS.rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            dotted = ".".join(path.relative_to(BENCHMARKS.parent).with_suffix("").parts)
            found.add(dotted.removesuffix(".__main__"))
    shell = {str(path.relative_to(BENCHMARKS.parent)) for path in BENCHMARKS.rglob("*.sh")}
    return (found | shell) - STARTED_BY_OTHERS


def test_every_script_has_a_line() -> None:
    named = {command.removeprefix("python -m ").split()[0] for command in COMMANDS}
    assert named == scripts()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith("python")])
def test_every_command_has_its_arguments_and_options(command: str) -> None:
    _, _, module, *words = shlex.split(command)
    if module == "benchmarks.research.penalty_search":
        pytest.importorskip("optuna", reason="optuna comes with the extra 'research'")
    name = f"{module}.__main__" if module == "benchmarks.demo" else module
    main: click.Command = importlib.import_module(name).main
    known = {option for parameter in main.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    required = [parameter for parameter in main.params if parameter.required]
    options = [each.opts[0] for each in required if isinstance(each, click.Option)]
    assert set(options) <= set(words)


def test_every_folder_has_a_section() -> None:
    folders = {path.parent.name for path in BENCHMARKS.glob("*/__init__.py")}
    assert set(re.findall(r"^## (\w+):", README, re.MULTILINE)) == folders
