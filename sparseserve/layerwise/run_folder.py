"""The folder of an unfinished run, beside the output: what lets a killed run go on.

``OUT.partial/`` holds the fingerprint of the run, every finished layer, and the checkpoint being
built. It becomes ``OUT`` by a rename at the very end, so ``OUT`` is whole or absent.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import Checkpoint, save_tensors, write_json, writing
from sparseserve.errors import ArtifactError
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.report import LayerReport

_FINGERPRINT = "run.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An opened run; implements the pipeline's ``LayerStore``."""

    path: Path
    out: Path

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, object]) -> RunFolder:
        """Start a run that will end in ``out``, or go on with one of the same ``fingerprint``.

        Raises:
            ArtifactError: ``out`` is not empty, or an unfinished run used other settings.
        """
        require_free(out)
        folder = cls(out.with_name(out.name + ".partial"), out)
        canonical = json.loads(json.dumps(fingerprint))
        state = folder.path / _FINGERPRINT
        if state.exists() and read_json(state) != canonical:
            raise ArtifactError(
                f"{folder.path}: holds an unfinished run with another model, recipe or "
                "calibration: remove it, or repeat the command that began it"
            )
        with writing(state):
            folder._layers.mkdir(parents=True, exist_ok=True)
        write_json(state, canonical)
        return folder

    @property
    def _layers(self) -> Path:
        return self.path / "layers"

    def load(self, layer: str) -> PrunedLayer | None:
        """Return a finished layer, or None."""
        folder = self._layers / layer
        if not (folder / "report.json").exists():
            return None
        report = LayerReport.from_json(read_json(folder / "report.json"))
        return PrunedLayer(dict(Checkpoint.open(folder).tensors()), report)

    def save(self, layer: str, pruned: PrunedLayer) -> None:
        """Keep a finished layer; the report is written last and marks it whole.

        Raises:
            ArtifactError: The disk is full.
        """
        folder = self._layers / layer
        with writing(folder):
            folder.mkdir(exist_ok=True)
        save_tensors(folder / "model.safetensors", pruned.parameters)
        write_json(folder / "report.json", asdict(pruned.report))

    def fresh(self, name: str) -> Path:
        """Return the path of a new subfolder, removing what an earlier attempt left there."""
        folder = self.path / name
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def publish(self, folder: Path) -> None:
        """Move the finished ``folder`` to the output and remove the rest of the run.

        Raises:
            ArtifactError: The output was filled meanwhile, or cannot be written.
        """
        require_free(self.out)
        with writing(self.out):
            if self.out.exists():
                self.out.rmdir()
            folder.rename(self.out)
        shutil.rmtree(self.path)


def require_free(out: Path) -> None:
    """Refuse an output folder that already holds something.

    Raises:
        ArtifactError: Names the folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out}: exists and is not empty: choose another output folder")
