"""Prunes a model with another tool and keeps what it writes, for scripts that ask it more.

The tool gets the calibration windows that our methods get with the same options, and the result is
checked to be 2:4, as in ``benchmarks.peers.compare``::

    python -m benchmarks.peers.checkpoint demo/models/smollm2-135m demo/llm-compressor \
        --tool llmcompressor:sparsegpt --samples 256
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.peers.compare import chosen, compare
from benchmarks.peers.environment import (
    Peer,
    PeerError,
    WorkerReport,
    environment,
    run_peer,
    write_windows,
)
from sparseserve.cli.console import quiet_libraries
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan


def write_checkpoint(
    model: str, out: Path, peer: Peer, method: str, spec: CalibrationSpec, *, python: Path
) -> WorkerReport:
    """Prune ``model`` with a tool into the new folder ``out``.

    Raises:
        PeerError: ``out`` is there, the tool failed, saw other tokens, or its result is not 2:4.
    """
    if out.exists():
        raise PeerError(f"{out} is there already: give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    operators = [name for name, _ in plan(Job(model)).operators]
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        windows, built = Path(scratch) / "windows.safetensors", Path(scratch) / "pruned"
        digest = write_windows(model, spec, windows)
        report = run_peer(
            peer, method, python=python, model=model, windows=windows, checkpoint=built
        )
        if report.digest != digest:
            raise PeerError(f"{peer.tool} read other tokens than were written")
        compare(built, Path(model), operators)
        built.rename(out)
    return report


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tool", default="llmcompressor:sparsegpt", show_default=True, help="TOOL:METHOD.")
@click.option("--samples", default=256, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--calibration", help="Calibration text; default: the packaged one.")
def main(
    *,
    model: str,
    out: Path,
    tool: str,
    samples: int,
    sequence_length: int,
    seed: int,
    calibration: str | None,
) -> None:
    quiet_libraries()
    ((peer, method),) = chosen([tool])
    spec = CalibrationSpec(
        source=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        scrambled=0,
    )
    report = write_checkpoint(model, out, peer, method, spec, python=environment(peer))
    click.echo(f"{out}: {report.tool} {report.version}, {report.seconds:.0f} s")


if __name__ == "__main__":
    main()
