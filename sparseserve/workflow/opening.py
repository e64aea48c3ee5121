"""Opening a run: the model, its text, a rehearsal, and the fingerprint that a resumed run has."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import file_sha256
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.output_place import OutputPlace
from sparseserve.checkpoint.run_folder import Fingerprint
from sparseserve.checkpoint.weight_files import CONFIG_FILE, INDEX_FILE, weight_files
from sparseserve.devices import arithmetic_of
from sparseserve.exporters.side_files import side_files, source_card
from sparseserve.models.loading import LoadedModel, load_model
from sparseserve.models.structure import ModelStructure
from sparseserve.paths import existing_parent
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.text import position_limit, vocabulary_size
from sparseserve.text.calibration import CalibrationSet, load_calibration
from sparseserve.workflow.job import Job
from sparseserve.workflow.needs import Needs
from sparseserve.workflow.rehearsal import rehearse

# Whose releases decide the bytes of a result.
_PACKAGES = ("sparseserve", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Opening:
    """What every run begins with.

    Attributes:
        job: What is to be done.
        loaded: The dense model.
        calibration: The windows it is pruned with.
        structure: Its decoder layers.
        needs: What the run will take of memory and disk.
        fingerprint: Everything that decides the bytes of the pruned layers.
    """

    job: Job
    loaded: LoadedModel
    calibration: CalibrationSet
    structure: ModelStructure
    needs: Needs
    fingerprint: Fingerprint


def open_run(job: Job, place: OutputPlace | None) -> Opening:
    """Load the model and its text, and rehearse all that the run will need to end.

    Args:
        job: What is to be done.
        place: Where the result will go; None asks nothing of the disk.

    Raises:
        SparseServeError: Any of its kinds: the run could not end well.
    """
    recipe, device, progress = job.recipe, job.runs_on, job.progress
    job.engine.check(recipe, device)
    require_fit(job.stored_as, str(recipe.pattern), recipe.quantization)
    progress.stage(f"loading {job.source}")
    scratch = existing_parent(place.partial) if place else Path(tempfile.gettempdir())
    loaded = load_model(job.source, dtype=recipe.torch_dtype, scratch=scratch)
    progress.stage("reading calibration text")
    config = loaded.model.config
    knobs = recipe.retraining
    calibration = load_calibration(
        recipe.calibration,
        loaded.tokenizer,
        position_limit(config),
        vocabulary_size(config),
        fresh=knobs.fresh if knobs.epochs else 0,
    )
    progress.stage("rehearsing the run")
    structure, needs = rehearse(job, loaded, calibration, place)
    fingerprint = _fingerprint(loaded, recipe, calibration, device)
    return Opening(job, loaded, calibration, structure, needs, fingerprint)


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
        {
            **parts,
            "calibration": calibration.record.digest,
            "text for retraining": str(calibration.record.fresh_digest),
            "device": arithmetic_of(device, recipe.autocast_to(device)),
        }
    )


def _model_files(loaded: LoadedModel) -> set[str]:
    """Return the files in the model's folder that decide the result: what is read or copied.

    Whatever else lies there, such as a log of this very run, may change while a run is interrupted.
    """
    weights, card = weight_files(loaded.folder), source_card(loaded.folder)
    found = {CONFIG_FILE, *weights.names, *side_files(loaded.folder)}
    if weights.weight_map is not None:
        found.add(INDEX_FILE)
    return found if card is None else found | {card.name}
