"""Opening a run: the model, its text, a rehearsal, and the fingerprint that a resumed run has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from sparseserve.checkpoint.artifact import file_sha256
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.output_place import OutputPlace
from sparseserve.checkpoint.run_folder import Fingerprint
from sparseserve.devices import default_device
from sparseserve.exporters.side_files import side_files
from sparseserve.models.loading import LoadedModel, load_model
from sparseserve.models.structure import ModelStructure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.rehearsal import rehearse
from sparseserve.text import position_limit, vocabulary_size
from sparseserve.text.calibration import CalibrationSet, load_calibration

# Whose releases decide the bytes of a result.
_PACKAGES = ("sparseserve", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Opening:
    """What every run begins with.

    Attributes:
        loaded: The dense model.
        calibration: The windows it is pruned with.
        structure: Its decoder layers.
        device: Where it is pruned.
        fingerprint: Everything that decides the bytes of the pruned layers.
    """

    loaded: LoadedModel
    calibration: CalibrationSet
    structure: ModelStructure
    device: torch.device
    fingerprint: Fingerprint


def open_run(
    source: str,
    recipe: PruneRecipe,
    *,
    place: OutputPlace | None,
    export_format: str | None,
    device: torch.device | None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Opening:
    """Load the model and its text, and rehearse all that the run will need to end.

    Args:
        source: A folder, or a name on the Hugging Face hub.
        recipe: What is to be done.
        place: Where the result will go; None asks nothing of the disk.
        export_format: How the result will be stored; None asks nothing of the format.
        device: Where to prune; None is a CUDA device if there is one.
        on_stage: Told what is going on.

    Raises:
        SparseServeError: Any of its kinds: the run could not end well.
    """
    if export_format is not None:
        require_fit(export_format, str(recipe.pattern))
    device = device or default_device()
    on_stage(f"loading {source}")
    loaded = load_model(source, dtype=recipe.torch_dtype)
    on_stage("reading calibration text")
    config = loaded.model.config
    calibration = load_calibration(
        recipe.calibration, loaded.tokenizer, position_limit(config), vocabulary_size(config)
    )
    on_stage("rehearsing the run")
    structure = rehearse(
        loaded,
        recipe,
        calibration,
        export_format=export_format,
        place=place,
        device=device,
    )
    return Opening(
        loaded, calibration, structure, device, _fingerprint(loaded, recipe, calibration, device)
    )


def with_part(fingerprint: Fingerprint, name: str, value: object) -> Fingerprint:
    """Return a ``fingerprint`` with another thing, JSON data, that the result depends on."""
    return Fingerprint({**fingerprint.parts, name: json.dumps(value, sort_keys=True)})


def _fingerprint(
    loaded: LoadedModel, recipe: PruneRecipe, calibration: CalibrationSet, device: torch.device
) -> Fingerprint:
    parts = {
        f"recipe {key}": json.dumps(value, sort_keys=True)
        for key, value in recipe.to_json().items()
    }
    parts |= {f"release of {name}": metadata.version(name) for name in _PACKAGES}
    parts |= {
        f"model file {name}": file_sha256(loaded.folder / name) for name in _model_files(loaded)
    }
    return Fingerprint(
        {**parts, "calibration": calibration.record.digest, "device": _description(device)}
    )


def _model_files(loaded: LoadedModel) -> set[str]:
    """Return the files of the model's folder, and those below it that come along."""
    top = {path.name for path in loaded.folder.iterdir() if path.is_file()}
    return top | set(side_files(loaded.folder))


def _description(device: torch.device) -> str:
    """Say what arithmetic ``device`` does."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
