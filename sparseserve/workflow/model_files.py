"""A model in memory as what a checkpoint is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePath

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import Manifest
from sparseserve.checkpoint.summary import BASE_FOLDER, BASE_MODEL
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.exporters.side_files import model_config
from sparseserve.exporters.stored import DenseSource
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.huggingface.names import stored_modules
from sparseserve.models.loading import LoadedModel
from sparseserve.models.model_folder import hub_name
from sparseserve.models.saving import stored_tensors
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import PruneReport
from sparseserve.text.calibration import CalibrationSet


def pruned_source(
    loaded: LoadedModel,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    report: PruneReport,
    scales: Mapping[str, Tensor],
) -> DenseSource:
    """Return the pruned model as what its checkpoint is made of.

    Args:
        loaded: The model, pruned in place.
        recipe: By which.
        calibration: With what.
        report: What happened.
        scales: Of operators that were rounded to codes, by full name.
    """
    places = stored_modules(loaded.model, [operator.name for operator in report.operators])
    stacks = {place.stack.tensor: place.stack for place in places.values() if place.stack}
    manifest = Manifest(
        format="dense",
        pattern=str(recipe.pattern),
        # The rehearsal saw that each has a place.
        pruned=tuple(places[item.name].name for item in report.operators),
        transposed=tuple(places[item.name].name for item in report.operators if item.transposed),
        stacks=tuple(stacks.values()),
        source=str(loaded.source),
        recipe=recipe.to_json(),
        calibration=asdict(calibration.record),
        report={**report.to_json(), **base_of(loaded.source, loaded.folder)},
        files={},
    )
    return DenseSource(
        folder=loaded.folder,
        config=model_settings(loaded, recipe),
        manifest=manifest,
        dtype=_pruned_dtype(loaded, report),
        tensors=_all_tensors(loaded),
        quantization=recipe.quantization,
        scales={places[name].name: scale for name, scale in scales.items()},
    )


def base_of(source: str, folder: Path) -> dict[str, str]:
    """Return what a manifest's report says of where the model ``source``, in ``folder``, is from.

    ``source`` is told as it was given; what is relative to a folder of then names nothing later.
    """
    if name := hub_name(source, folder):
        return {BASE_MODEL: name}
    own_name = folder.resolve().name
    named = PurePath(source).name not in ("", "..")
    return {BASE_FOLDER: own_name} if own_name and not named else {}


def model_settings(loaded: LoadedModel, recipe: PruneRecipe) -> dict[str, object]:
    """Return what config.json says of the model, whose weights are dense now."""
    settings = model_config(loaded.folder, recipe.torch_dtype)
    settings.pop("quantization_config", None)
    return settings


def left_out(loaded: LoadedModel) -> tuple[str, ...]:
    """Return the tensors of a quantised source that are not copied, though its class leaves them.

    Nothing in the dense result would say how they are to be read.
    """
    quantised = model_config(loaded.folder).get("quantization_config")
    return loaded.unread if quantised else ()


def copied_from(loaded: LoadedModel) -> Checkpoint | None:
    """Open the files of a source whose unread tensors are copied; None where there are none.

    Raises:
        ArtifactError: The index and the files of the source disagree, which its class overlooks.
    """
    return Checkpoint.open(loaded.folder) if loaded.unread and not left_out(loaded) else None


def _all_tensors(loaded: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the model, then as they are those that its class has no place for."""
    yield from stored_tensors(loaded.model)
    if source := copied_from(loaded):
        for name in loaded.unread:
            yield name, source.tensor(name)


def _pruned_dtype(loaded: LoadedModel, report: PruneReport) -> torch.dtype:
    with unstacked_experts(loaded.model):
        kinds = [
            loaded.model.get_parameter(f"{operator.name}.weight").dtype
            for operator in report.operators[:1]
        ]
    return kinds[0] if kinds else torch.get_default_dtype()
