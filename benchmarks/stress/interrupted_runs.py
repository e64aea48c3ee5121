"""Does a run that was killed, or could not write, end in the bytes of an undisturbed one?

`sparseserve prune-and-export` prunes a tiny model. strace lists the calls by which it changes
files. Then, for one call after the other, a run is killed at that call, or the call fails as on a
full disk or in a folder that may only be read; the same command is given again, and its result is
compared, file by file, with that of an undisturbed run. Then runs are killed at random moments, or
stopped while the same command runs a second time. ::

    python -m benchmarks.stress.interrupted_runs
    python -m benchmarks.stress.interrupted_runs --kills 1000 --failures 400 --moments 200
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, write_result
from benchmarks.stress.traced_run import (
    WRITES,
    Ended,
    Event,
    disturbed,
    events,
    killed_after,
    require_strace,
    run,
    run_twice,
    warm_up,
)
from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.testing import save_tiny_model

_KILL, _FULL, _READ_ONLY = "signal=SIGKILL", "error=ENOSPC", "error=EROFS"
# Parts of a report that differ from run to run.
_MEASURED = frozenset({"seconds", "peak_memory_bytes", "environment", "sha256", "bytes"})


@dataclass(frozen=True, slots=True)
class Work:
    """One command: the tiny family that it prunes, and its options."""

    name: str
    family: str
    options: tuple[str, ...]


_SHORT = ("--samples", "2", "--sequence-length", "32")
WORKS = (
    Work("packed24, untrained", "llama", (*_SHORT, "--recipe", "untrained")),
    Work("packed24, trained", "llama", (*_SHORT, "--reconstruct", "1")),
    Work("dense, experts", "mixtral", (*_SHORT, "--recipe", "fast", "--format", "dense")),
    Work("packed24, int8", "qwen3", (*_SHORT, "--recipe", "fast", "--quantize", "int8")),
    Work("packed24, retrained", "gpt2", (*_SHORT, "--recipe", "fast", "--retrain", "1")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What disturbing one command at many places came to.

    Attributes:
        work: The command.
        fault: What happened to it.
        tried: How many runs.
        hit: Of them those that were disturbed while they ran.
        same: Those that ended, some at the second try, in the bytes of an undisturbed run.
        refused: Those that ended in one line that says why; the second try is counted above.
        wrong: What else happened, and at which call.
    """

    work: str
    fault: str
    tried: int
    hit: int
    same: int
    refused: int
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder in which one command is given again and again."""

    work: Work
    folder: Path

    @property
    def out(self) -> Path:
        """Where the result appears."""
        return self.folder / "place" / "out"

    @property
    def arguments(self) -> list[str]:
        """The command line."""
        model = str(self.folder / "model")
        return ["prune-and-export", model, "-o", str(self.out), *self.work.options]

    def cleared(self) -> Stage:
        """Remove what earlier runs left."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        return self


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file, of the manifest without what differs from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        if path.name == MANIFEST_FILE:
            data = json.dumps(_without_measured(json.loads(data)), sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def _without_measured(value: object) -> object:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _MEASURED}
        return {key: _without_measured(item) for key, item in kept.items() if "sha256" not in key}
    return [_without_measured(item) for item in value] if isinstance(value, list) else value


def problem(stage: Stage, first: Ended, expected: dict[str, str]) -> str:
    """Give the command again if need be, and say what is wrong then; nothing is an empty text."""
    if "Traceback" in first.output:
        return f"a traceback: {first.output.strip().splitlines()[-1]}"
    if first.code == 0 and not stage.out.exists():
        return "success was said, but there is no result"
    if not stage.out.exists() or any(stage.out.parent.glob("*partial*")):
        again = run(stage.arguments, stage.folder)
        if again.code:
            return f"the second try failed: {again.output.strip().splitlines()[-1]}"
    if contents(stage.out) != expected:
        return "other bytes"
    if left := sorted(path.name for path in stage.out.parent.iterdir() if path != stage.out):
        return f"{left[0]} was left behind"
    return ""


def measure(stage: Stage, counts: tuple[int, int, int], seed: int) -> Iterator[Row]:
    """Disturb one command.

    Args:
        stage: The command.
        counts: Kills at system calls, calls that fail for each of two reasons, and random moments
            for each of two disturbances.
        seed: Of the moments.

    Raises:
        click.ClickException: The undisturbed command fails.
    """
    kills, failures, moments = counts
    warm_up(stage.cleared().arguments, stage.folder)
    started = time.perf_counter()
    undisturbed = run(stage.cleared().arguments, stage.folder)
    lasts = time.perf_counter() - started
    if undisturbed.code:
        raise click.ClickException(undisturbed.output)
    expected = contents(stage.out)
    ended, found = events(stage.cleared().arguments, stage.folder, stage.out.parent)
    if ended.code or contents(stage.out) != expected:
        raise click.ClickException(f"{stage.work.name}: a second run gives other bytes")
    places = _spread(found, kills)
    yield _row(stage, "killed at a system call", places, _KILL, expected)
    writes = [event for event in found if event.name in WRITES]
    for name, fault in (("disk full", _FULL), ("folder read-only", _READ_ONLY)):
        yield _row(stage, name, _spread(writes, failures), fault, expected)
    chance = random.Random(seed)
    times = [chance.uniform(0, lasts) for _ in range(2 * moments)]
    killed = [_killed(stage, seconds, expected) for seconds in times[:moments]]
    yield _summed(stage, "killed at a random moment", killed)
    twice = [_begun_twice(stage, seconds, expected) for seconds in times[moments:]]
    yield _summed(stage, "a second run of it", twice)


def _killed(stage: Stage, seconds: float, expected: dict[str, str]) -> tuple[Ended, str, str]:
    ended = killed_after(stage.cleared().arguments, stage.folder, seconds)
    return ended, problem(stage, ended, expected), f"after {seconds:.3f} s"


def _begun_twice(stage: Stage, seconds: float, expected: dict[str, str]) -> tuple[Ended, str, str]:
    """Run the command while it runs; one of the two may be refused, and none be wrong."""
    other = stage.folder / "other"
    other.mkdir(exist_ok=True)
    first, second = run_twice(stage.cleared().arguments, (stage.folder, other), seconds)
    wrong = problem(stage, first, expected) or problem(stage, second, expected)
    if not wrong and first.code and second.code:
        wrong = f"both were refused: {second.output.strip().splitlines()[-1]}"
    return (first if first.code else second), wrong, f"after {seconds:.3f} s"


def _row(
    stage: Stage, name: str, places: Sequence[Event], fault: str, expected: dict[str, str]
) -> Row:
    ends = []
    for event in places:
        ended = disturbed(stage.cleared().arguments, stage.folder, event, fault)
        ends.append((ended, problem(stage, ended, expected), event.what))
    return _summed(stage, name, ends)


def _summed(stage: Stage, name: str, ends: Sequence[tuple[Ended, str, str]]) -> Row:
    return Row(
        work=stage.work.name,
        fault=name,
        tried=len(ends),
        hit=sum(ended.code != 0 for ended, _, _ in ends),
        same=sum(not wrong for _, wrong, _ in ends),
        refused=sum(ended.code == 1 and "Error: " in ended.output for ended, _, _ in ends),
        wrong=tuple(f"{where}: {wrong}" for _, wrong, where in ends if wrong),
    )


def _spread(found: Sequence[Event], count: int) -> Sequence[Event]:
    """Return ``count`` of the events, evenly spread, or all and some of them again."""
    if count >= len(found):
        return [found[number % len(found)] for number in range(count)] if found else []
    return [found[number * len(found) // count] for number in range(count)]


def interrupted_runs_table(result: Result) -> str:
    """What became of disturbed runs."""
    lines = [head("command", "disturbed by", "runs", "hit", "same bytes in the end", "refused")]
    for row in result["rows"]:
        counts = (str(row[key]) for key in ("tried", "hit", "same", "refused"))
        lines.append(line(row["work"], row["fault"], *counts))
    lines.append(
        "\nA run is hit if it, or the second one beside it, did not end by itself and in success. "
        "Refused ones said why in one line; all others were killed. After either, the same command "
        "was given again. "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.option("--kills", default=150, show_default=True, help="At system calls, all in all.")
@click.option(
    "--failures", default=90, show_default=True, help="Writes that fail, for each of two reasons."
)
@click.option(
    "--moments", default=60, show_default=True, help="Random ones, to kill and to run again."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--smoke", is_flag=True, help="A few of the first command; writes nothing.")
def main(*, kills: int, failures: int, moments: int, seed: int, smoke: bool) -> None:
    require_strace()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # threads do not live on in a forked process
    works = WORKS[:1] if smoke else WORKS
    many = (kills // len(works), failures // len(works), moments // len(works))
    counts = (2, 1, 1) if smoke else many
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, work in enumerate(works):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            save_tiny_model(work.family, folder / "model")
            for row in measure(Stage(work, folder), counts, seed):
                rows.append(row)
                click.echo(json.dumps(asdict(row)))
                if not smoke:
                    write_result(RESULTS / "interrupted-runs.json", {"seed": seed}, rows=rows)


if __name__ == "__main__":
    main()
