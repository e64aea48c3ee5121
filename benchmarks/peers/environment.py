"""Other tools in environments of their own: making these, and running a tool in its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparseserve.checkpoint.tensors import save_tensors
from sparseserve.errors import SparseServeError
from sparseserve.models.loading import load_model
from sparseserve.text import position_limit
from sparseserve.text.calibration import CalibrationSpec, load_calibration

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / "demo" / "peers"
INSTALLED = ".installed"


class PeerError(SparseServeError):
    """Another tool could not be installed, failed, or did something else than it was asked."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool: its name on the package index, and its methods that know 2:4."""

    tool: str
    methods: tuple[str, ...]

    @property
    def requirements(self) -> Path:
        """The pinned packages of its environment."""
        return HERE / f"requirements-{self.tool.removeprefix('nvidia-')}.txt"


PEERS = (
    Peer("llmcompressor", ("sparsegpt", "wanda", "sparsegpt-dense-inputs")),
    Peer("nvidia-modelopt", ("sparsegpt",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What ``benchmarks/peers/worker.py`` says of a run; ``seconds`` is the tool's own call."""

    tool: str
    version: str
    method: str
    seconds: float
    peak_memory_bytes: int
    threads: int
    torch: str
    transformers: str
    tokens: int
    digest: str


def environment(peer: Peer, root: Path = ENVIRONMENTS) -> Path:
    """Return the Python of ``peer``'s environment, made where it is missing or out of date.

    Raises:
        PeerError: Its packages cannot be installed.
    """
    folder = root / peer.tool
    python = folder / "bin" / "python"
    wanted = hashlib.sha256(peer.requirements.read_bytes()).hexdigest()
    marker = folder / INSTALLED
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return python
    click.echo(f"installing {peer.tool} in {folder}", err=True)
    _call([sys.executable, "-m", "venv", str(folder)])
    _call([str(python), "-m", "pip", "install", "--quiet", "-r", str(peer.requirements)])
    marker.write_text(wanted, encoding="utf-8")
    return python


def write_windows(model: str, spec: CalibrationSpec, path: Path) -> str:
    """Write the calibration windows of ``spec`` as int64 ``[samples, length]``; return the digest.

    Raises:
        SparseServeError: The model cannot be loaded or the text cannot be used.
    """
    loaded = load_model(model)
    calibration = load_calibration(spec, loaded.tokenizer, position_limit(loaded.model.config))
    save_tensors(path, {"windows": torch.stack(calibration.windows)})
    return calibration.record.digest


def read_windows(path: Path) -> Tensor:
    """Read what ``write_windows`` wrote."""
    return load_file(path)["windows"]


def run_peer(
    peer: Peer, method: str, *, python: Path, model: str, windows: Path, checkpoint: Path | None
) -> WorkerReport:
    """Prune ``model`` with a tool in its own process; its output goes to standard error.

    Args:
        peer: The tool.
        method: One of its methods.
        python: Of the tool's environment.
        model: A folder.
        windows: The calibration windows.
        checkpoint: Where to write the pruned model; None to write none.

    Raises:
        PeerError: The tool failed or calibrated on other tokens.
    """
    report = windows.with_suffix(".report.json")
    command = [str(python), "-P", str(HERE / "worker.py"), "--model", model]
    command += ["--windows", str(windows), "--tool", peer.tool, "--method", method]
    command += ["--report", str(report)]
    if checkpoint:
        command += ["--checkpoint", str(checkpoint)]
    _call(command)
    return WorkerReport(**json.loads(report.read_text(encoding="utf-8")))


def peer_settings() -> dict[str, str]:
    """Return the environment variables of another tool's process: it sees its own packages only."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings.pop("PYTHONPATH", None)
    return settings


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=sys.stderr, env=peer_settings(), check=False)
    if done.returncode:
        raise PeerError(f"'{' '.join(command)}' failed with code {done.returncode}; see above")
