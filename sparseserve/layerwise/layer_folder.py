"""Finished layers on disk, so that a killed run goes on after them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sparseserve.checkpoint.artifact import file_sha256
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.checkpoint.tensors import Checkpoint, save_tensors, writing
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.report import LayerReport

_WEIGHTS = "model.safetensors"
_REPORT = "report.json"
_SCALE = ".weight_scale"


@dataclass(frozen=True, slots=True)
class LayerFolder:
    """A folder of finished layers; implements the pipeline's ``LayerStore``.

    Attributes:
        path: Where the layers lie, each in a folder of its name.
        scratch: Where folders lie that need not outlive the run.
        progress: Told of a stored layer that is damaged and will be pruned again.
    """

    path: Path
    scratch: Path
    progress: PruneProgress

    def load(self, layer: str) -> PrunedLayer | None:
        """Return a finished layer; None if it is not there, or not as it was stored."""
        folder = self.path / layer
        if not folder.exists():
            return None
        stored = read_sealed(folder / _REPORT)
        weights = folder / _WEIGHTS
        whole = (
            isinstance(stored, dict)
            and weights.is_file()
            and file_sha256(weights) == stored["weights"]
        )
        if not whole:
            if (folder / _REPORT).exists():
                self.progress.stage(f"{folder}: damaged since it was stored: pruning {layer} again")
            return None
        assert isinstance(stored, dict)
        parameters, scales = {}, {}
        for name, tensor in Checkpoint.open(folder).tensors():
            if name.endswith(_SCALE):
                scales[name.removesuffix(_SCALE)] = tensor
            else:
                parameters[name] = tensor
        return PrunedLayer(parameters, LayerReport.from_json(stored["report"]), scales)

    def save(self, layer: str, pruned: PrunedLayer) -> None:
        """Keep a finished layer; the report is written last and marks it whole.

        Raises:
            ArtifactError: The disk is full.
        """
        folder = self.path / layer
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _REPORT).unlink(missing_ok=True)
        scales = {f"{name}{_SCALE}": scale for name, scale in pruned.scales.items()}
        save_tensors(folder / _WEIGHTS, {**pruned.parameters, **scales})
        sealed = {"weights": file_sha256(folder / _WEIGHTS), "report": asdict(pruned.report)}
        write_sealed(folder / _REPORT, sealed)

    def fresh(self, name: str) -> Path:
        """Return the path of a folder, not there yet, for what need not outlive the run."""
        folder = self.scratch / name
        with writing(folder):
            self.scratch.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                shutil.rmtree(folder)
        return folder
