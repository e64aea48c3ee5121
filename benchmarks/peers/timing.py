"""How long do other tools and ours take to prune, in turns, each in a process of its own?

Ours are every method on the dense model's inputs, SparseGPT also on those that pruned layers leave,
as its authors run it, the published recipe, and the default one with and without its training.

Counted is the pruning call alone, calibration passes included, loading and the final checkpoint
not. Ours also writes every finished layer to disk in that time, so that a killed run can go on.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.machine import Machine
from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import Result
from benchmarks.peers.environment import Peer, PeerError, environment, run_peer, write_windows
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import write_json
from sparseserve.pruners import PRUNERS
from sparseserve.report import PruneReport
from sparseserve.text.calibration import CalibrationSpec

OURS = "sparseserve"
REFERENCE = "sparsegpt, sequential"
# The published search has no end of its own; the recipe ``paper`` gives it one.
METHODS = {name: f"--recipe untrained --method {name}" for name in PRUNERS} | {
    "fista-paper": "--recipe paper"
}
# What to call each run of ours, and its options of ``prune-and-export``.
OURS_TIMED = {
    REFERENCE: "--method sparsegpt",
    "default, untrained": "--recipe untrained",
    "default": "--recipe default",
    **{f"{name}, none": f"{options} --error-correction none" for name, options in METHODS.items()},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One pruning run; ``peak_memory_bytes`` is that of its process."""

    tool: str
    method: str
    repeat: int
    seconds: float
    peak_memory_bytes: int


def time_in_turns(
    model: str,
    spec: CalibrationSpec,
    wanted: Sequence[tuple[Peer, str]],
    ours: Mapping[str, str],
    repeats: int,
) -> Iterator[Timing]:
    """Time every tool and method of ``wanted``, then ``ours``, which is labels and options.

    Raises:
        PeerError: A run failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        windows = Path(scratch) / "windows.safetensors"
        digest = write_windows(model, spec, windows)
        for repeat in range(repeats):
            for peer, method in wanted:
                yield _time_theirs(peer, method, model, windows, repeat)
            for label, options in ours.items():
                yield time_ours(model, spec, label, options, repeat=repeat, digest=digest)


def ours_timed(labels: Collection[str]) -> dict[str, str]:
    """Return the reference and the runs of OURS_TIMED that ``labels`` name; all for none.

    Raises:
        PeerError: Nothing is called so.
    """
    if unknown := set(labels) - set(OURS_TIMED):
        raise PeerError(f"--ours-only {min(unknown)}: not one of {'; '.join(OURS_TIMED)}")
    chosen = {REFERENCE, *labels} if labels else OURS_TIMED
    return {label: options for label, options in OURS_TIMED.items() if label in chosen}


def write_timings(path: Path, model: str, spec: CalibrationSpec, runs: Iterable[Timing]) -> None:
    """Write ``runs``, as many as there are after each."""
    timings: list[Timing] = []
    for timing in runs:
        timings.append(timing)
        click.echo(timing, err=True)
        write_json(
            path,
            {
                "model": model,
                "calibration": asdict(spec),
                "machine": asdict(Machine.here()),
                "timings": [asdict(timing) for timing in timings],
            },
        )


def timing_table(result: Result) -> str:
    """Median time and highest peak memory of each run, and times relative to our SparseGPT."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for timing in result["timings"]:
        groups.setdefault((timing["tool"], timing["method"]), []).append(timing)
    seconds = {
        key: statistics.median(timing["seconds"] for timing in timings)
        for key, timings in groups.items()
    }
    lines = [head("tool", "method", "seconds", "/ our SparseGPT", "peak memory, GiB")]
    for (tool, method), timings in groups.items():
        peak = max(timing["peak_memory_bytes"] for timing in timings) / 2**30
        own = seconds[tool, method]
        share = own / seconds[OURS, REFERENCE]
        lines.append(line(tool, method, f"{own:.0f}", f"{share:.2f}", f"{peak:.2f}"))
    spec, machine = result["calibration"], result["machine"]
    tokens = spec["samples"] * spec["sequence_length"]
    repeats = min(len(timings) for timings in groups.values())
    lines.append(
        f"\n`{Path(result['model']).name}`, {tokens:,} calibration tokens; "
        f"{f'medians of {repeats} runs in turns' if repeats > 1 else 'one run each'}; "
        f"{processor_and_software(machine)}"
    )
    return "\n".join(lines)


def _time_theirs(peer: Peer, method: str, model: str, windows: Path, repeat: int) -> Timing:
    report = run_peer(
        peer, method, python=environment(peer), model=model, windows=windows, checkpoint=None
    )
    return Timing(
        tool=peer.tool,
        method=method,
        repeat=repeat,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
    )


def time_ours(
    model: str, spec: CalibrationSpec, label: str, options: str, *, repeat: int, digest: str
) -> Timing:
    """Time one run of ours with these ``options`` on the windows of ``spec``.

    Args:
        model: What to prune.
        spec: The windows.
        label: What to call the method.
        options: Of ``prune-and-export``.
        repeat: Which turn this is.
        digest: Of the tokens that the tools were given.

    Raises:
        PeerError: The command failed, or calibrated on other tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        command = [sys.executable, "-m", "sparseserve", "prune-and-export", model, "-o", str(out)]
        command += [*options.split(), "--format", "dense", "--seed", str(spec.seed)]
        command += ["--samples", str(spec.samples)]
        command += ["--sequence-length", str(spec.sequence_length)]
        if spec.source:
            command += ["--calibration", spec.source]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise PeerError(f"'{' '.join(command)}' failed with code {done.returncode}")
        manifest = Artifact.open(out).manifest
    report = PruneReport.from_json(manifest.report)
    if manifest.calibration["digest"] != digest:
        raise PeerError(f"{OURS} {label} calibrated on other tokens than the tools were given")
    return Timing(
        tool=OURS,
        method=label,
        repeat=repeat,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
    )
