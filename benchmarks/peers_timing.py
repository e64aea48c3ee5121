"""How long do other tools and ours take to prune, in turns, each in a process of its own?

Counted is the pruning call alone, calibration passes included, loading and the final checkpoint
not. Ours also writes every finished layer to disk in that time, so that a killed run can go on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks.machine import Machine
from benchmarks.peers_environment import Peer, PeerError, environment, run_peer, write_windows
from sparseserve.artifact import Artifact
from sparseserve.calibration import CalibrationSpec
from sparseserve.pruners import PRUNERS
from sparseserve.report import PruneReport

OURS = "sparseserve"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One pruning run; ``peak_memory_bytes`` is that of its process."""

    tool: str
    method: str
    repeat: int
    seconds: float
    peak_memory_bytes: int


def time_in_turns(
    model: str, spec: CalibrationSpec, wanted: Sequence[tuple[Peer, str]], repeats: int
) -> dict[str, object]:
    """Time every tool and method of ``wanted``, then our methods of the same names.

    Raises:
        PeerError: A run failed.
    """
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as scratch:
        windows = Path(scratch) / "windows.safetensors"
        digest = write_windows(model, spec, windows)
        for repeat in range(repeats):
            for peer, method in wanted:
                report = run_peer(
                    peer,
                    method,
                    python=environment(peer),
                    model=model,
                    windows=windows,
                    checkpoint=None,
                )
                theirs = Timing(
                    tool=peer.tool,
                    method=method,
                    repeat=repeat,
                    seconds=report.seconds,
                    peak_memory_bytes=report.peak_memory_bytes,
                )
                timings += [theirs]
                click.echo(theirs, err=True)
            for method in dict.fromkeys(name for _, name in wanted if name in PRUNERS):
                timings += [time_ours(model, spec, method, repeat, digest)]
                click.echo(timings[-1], err=True)
    return {
        "model": model,
        "calibration": asdict(spec),
        "machine": asdict(Machine.here()),
        "timings": [asdict(timing) for timing in timings],
    }


def time_ours(model: str, spec: CalibrationSpec, method: str, repeat: int, digest: str) -> Timing:
    """Time one of our methods on the windows of ``spec``, whose digest is ``digest``.

    Raises:
        PeerError: The command failed, or calibrated on other tokens.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pruned"
        command = [sys.executable, "-m", "sparseserve", "prune-and-export", model, "-o", str(out)]
        command += ["--method", method, "--error-correction", "none", "--format", "dense"]
        command += ["--samples", str(spec.samples), "--seed", str(spec.seed)]
        command += ["--sequence-length", str(spec.sequence_length)]
        if spec.source:
            command += ["--calibration", spec.source]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise PeerError(f"'{' '.join(command)}' failed with code {done.returncode}")
        manifest = Artifact.open(out).manifest
    report = PruneReport.from_json(manifest.report)
    if manifest.calibration["digest"] != digest:
        raise PeerError(f"{OURS} {method} calibrated on other tokens than the tools were given")
    return Timing(
        tool=OURS,
        method=method,
        repeat=repeat,
        seconds=report.seconds,
        peak_memory_bytes=report.peak_memory_bytes,
    )
