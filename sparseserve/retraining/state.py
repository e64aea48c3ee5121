"""How far training has come, on disk, so that a killed run goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseserve.checkpoint.artifact import file_sha256
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.checkpoint.tensors import Checkpoint, save_tensors, writing
from sparseserve.report import HeldOutLoss

_WEIGHTS = "model.safetensors"
_STATE = "state.json"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Training after some steps; tensors lie where the parameters do, or on the CPU.

    Attributes:
        steps: How many were taken.
        losses: Held-out losses of the epochs that were judged.
        parameters: Their values.
        moments: The two moments of each that AdamW keeps.
        taken: How many of the steps moved each: without a gradient a step leaves it, such as the
            weights of an expert that no token reached.
        kept: Values after the best of those epochs; empty before the first is judged.
    """

    steps: int
    losses: tuple[HeldOutLoss, ...]
    parameters: Sequence[Tensor]
    moments: Sequence[tuple[Tensor, Tensor]]
    taken: Sequence[int]
    kept: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class StateFolder:
    """A folder that holds the last state.

    Attributes:
        path: The folder; made when it is needed.
        every_seconds: How often to save. Saving takes seconds; what a killed run has trained since
            the last time should be minutes at most.
    """

    path: Path
    every_seconds: float = 300.0

    def load(self) -> TrainingState | None:
        """Return the last state; None if it is not there, or not as it was saved."""
        sealed = read_sealed(self.path / _STATE)
        if not isinstance(sealed, dict):
            return None
        folder = self.path / str(sealed["steps"])
        weights = folder / _WEIGHTS
        if not weights.is_file() or file_sha256(weights) != sealed["weights"]:
            return None
        tensors = dict(Checkpoint.open(folder).tensors())
        count = sum(name.startswith("parameter.") for name in tensors)
        places = range(count)
        return TrainingState(
            steps=int(sealed["steps"]),
            losses=tuple(HeldOutLoss(**loss) for loss in sealed["losses"]),
            parameters=[tensors[f"parameter.{place}"] for place in places],
            moments=[(tensors[f"first.{place}"], tensors[f"second.{place}"]) for place in places],
            taken=[int(taken) for taken in sealed["taken"]],
            kept=[tensors[f"kept.{place}"] for place in places if "kept.0" in tensors],
        )

    def save(self, state: TrainingState) -> None:
        """Keep ``state``; what was saved before is removed when this one is whole.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        folder = self.path / str(state.steps)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / _WEIGHTS, _named(state))
        sealed: dict[str, Any] = {
            "steps": state.steps,
            "losses": [asdict(loss) for loss in state.losses],
            "taken": list(state.taken),
            "weights": file_sha256(folder / _WEIGHTS),
        }
        write_sealed(self.path / _STATE, sealed)
        with writing(self.path):
            for other in self.path.iterdir():
                if other.is_dir() and other != folder:
                    shutil.rmtree(other)


def _named(state: TrainingState) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for place, (value, (first, second)) in enumerate(
        zip(state.parameters, state.moments, strict=True)
    ):
        named |= {
            f"parameter.{place}": value,
            f"first.{place}": first,
            f"second.{place}": second,
        }
    named |= {f"kept.{place}": value for place, value in enumerate(state.kept)}
    return {name: tensor.detach().cpu() for name, tensor in named.items()}
