"""The main job: from a dense model to a pruned checkpoint in the format that was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparseserve.checkpoint.artifact import Artifact, Format, Manifest, verify, write_manifest
from sparseserve.checkpoint.output_place import not_empty
from sparseserve.checkpoint.run_folder import (
    Fingerprint,
    RunFolder,
    check_output,
    refuse_other_run,
)
from sparseserve.checkpoint.tensors import require_space
from sparseserve.exporters import EXPORTERS
from sparseserve.layerwise.layer import PruneProgress, Silence, planned_operators
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import LayerStore, ignored_modules, prune_model
from sparseserve.models.saving import save_weights
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.rehearsal import write_model
from sparseserve.report import PruneReport
from sparseserve.retraining.losses import DensePrediction, StoredPredictions, dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.runs import Opening, open_run
from sparseserve.text.calibration import CalibrationSet


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a run would do.

    Attributes:
        operators: Full names and shapes of the linears to prune, in pruning order.
        dense_modules: Linears in decoder layers that stay dense.
        pruned_parameters: Parameters in the operators, before pruning.
        total_parameters: Parameters of the whole model, tied ones counted once.
    """

    operators: tuple[tuple[str, tuple[int, int]], ...]
    dense_modules: tuple[str, ...]
    pruned_parameters: int
    total_parameters: int


def plan(
    source: str,
    recipe: PruneRecipe,
    *,
    out: Path | None = None,
    export_format: Format | None = None,
    device: torch.device | None = None,
) -> PrunePlan:
    """Find out what ``recipe`` would prune in the model ``source``; rehearse it, prune nothing.

    Args:
        source: A folder, or a name on the Hugging Face hub.
        recipe: What would be done.
        out: Where the result would go; None asks nothing of the disk.
        export_format: How it would be stored; None asks nothing of the format.
        device: Where it would be pruned; None is a CUDA device if there is one.

    Raises:
        SparseServeError: Whatever would stop the run, at its beginning or at its end.
    """
    place = None if out is None else check_output(out)
    opening = open_run(source, recipe, place=place, export_format=export_format, device=device)
    if place is not None:
        refuse_other_run(place, opening.fingerprint)
    structure = opening.structure
    operators = tuple(
        (f"{layer.name}.{item.name}", (item.out_features, item.in_features))
        for layer in structure.layers
        for item in planned_operators(layer, recipe)
    )
    parameters = opening.loaded.model.parameters()
    return PrunePlan(
        operators=operators,
        dense_modules=ignored_modules(structure, recipe),
        pruned_parameters=sum(rows * columns for _, (rows, columns) in operators),
        total_parameters=sum(parameter.numel() for parameter in parameters),
    )


def prune_and_export(
    source: str,
    out: Path,
    recipe: PruneRecipe,
    *,
    export_format: Format = "packed24",
    device: torch.device | None = None,
    store: LayerStore | None = None,
    progress: PruneProgress | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Artifact:
    """Prune the model ``source`` and write the checkpoint to the new folder ``out``.

    A run that is killed leaves ``OUT.partial``; the same call goes on from its last whole layer.

    Args:
        source: A folder, or a name on the Hugging Face hub.
        out: Must be absent or empty; appears whole at the end.
        recipe: What to do.
        export_format: How to store the result.
        device: Where to prune; None is a CUDA device if there is one.
        store: Keeps finished layers; None for the run's own folder.
        progress: Told of every layer and operator; None for nobody.
        on_stage: Told what is going on before, between and after.

    Raises:
        SparseServeError: Any of its kinds; nothing is left at ``out``.
    """
    with RunFolder.claim(out) as run:
        opening = open_run(
            source,
            recipe,
            place=run.place,
            export_format=export_format,
            device=device,
            on_stage=on_stage,
        )
        if run.begin(opening.fingerprint):
            return _finished(out, export_format)
        layers = store or LayerFolder(run.path / "layers", run.path, on_stage)
        report = _prune(opening, recipe, run, layers, progress=progress, on_stage=on_stage)
        on_stage("writing the checkpoint")
        artifact = _write_dense(run.fresh("dense"), opening, recipe, report)
        if export_format != "dense":
            on_stage(f"packing as {export_format}")
            artifact = EXPORTERS[export_format](artifact, run.fresh(export_format), None)
        run.publish(artifact.path)
    return replace(artifact, path=out)


def _finished(out: Path, export_format: str) -> Artifact:
    """Return the result of a run that had died while it moved it to ``out``.

    Raises:
        ArtifactError: It is damaged, or in another format than this time.
    """
    artifact = verify(out)
    if artifact.manifest.format != export_format:
        raise not_empty(out)
    return artifact


def _prune(
    opening: Opening,
    recipe: PruneRecipe,
    run: RunFolder,
    layers: LayerStore,
    *,
    progress: PruneProgress | None,
    on_stage: Callable[[str], None],
) -> PruneReport:
    """Prune the model in place, and retrain it if the recipe says so."""
    model, calibration, device = opening.loaded.model, opening.calibration, opening.device
    dense = _dense_predictions(
        model, recipe, calibration, run=run, device=device, on_stage=on_stage
    )
    on_stage("finding the model's structure")
    report = prune_model(
        model,
        recipe,
        calibration,
        store=layers,
        progress=progress or Silence(),
        device=device,
    )
    return _retrained(model, recipe, calibration, report, dense, device=device, on_stage=on_stage)


def _dense_predictions(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    *,
    run: RunFolder,
    device: torch.device,
    on_stage: Callable[[str], None],
) -> Sequence[DensePrediction]:
    """Return what the dense model predicts, if the recipe retrains towards that."""
    knobs = recipe.retraining
    if not knobs.epochs or not knobs.distillation:
        return ()
    on_stage("recording the dense model's predictions")
    found = StoredPredictions.write(
        run.fresh("predictions"),
        dense_predictions(model.to(device), calibration.windows, knobs.likeliest),
    )
    model.to("cpu")
    return found


def _retrained(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    report: PruneReport,
    dense: Sequence[DensePrediction],
    *,
    device: torch.device,
    on_stage: Callable[[str], None],
) -> PruneReport:
    """Retrain the pruned model in place, if the recipe says so, and add that to the report."""
    if not recipe.retraining.epochs:
        return report

    def say(done: int, total: int, loss: float) -> None:
        if done % len(calibration.windows) == 0 or done == total:
            on_stage(f"retraining: {done} of {total} windows, loss {loss:.4f}")

    operators = [operator.name for operator in report.operators]
    found = retrain(
        model.to(device),
        operators,
        calibration.windows,
        recipe.retraining,
        dense=dense,
        on_window=say,
    )
    model.to("cpu")
    return replace(report, retraining=found, seconds=report.seconds + found.seconds)


def _write_dense(
    folder: Path, opening: Opening, recipe: PruneRecipe, report: PruneReport
) -> Artifact:
    loaded = opening.loaded
    write_model(loaded, folder, recipe.torch_dtype, save_weights)
    names = [operator.name for operator in report.operators]
    manifest = Manifest(
        format="dense",
        pattern=str(recipe.pattern),
        pruned=tuple(names),
        transposed=tuple(operator.name for operator in report.operators if operator.transposed),
        source=str(loaded.source),
        recipe=recipe.to_json(),
        calibration=asdict(opening.calibration.record),
        report=report.to_json(),
        files={},
    )
    return write_manifest(folder, manifest)


def export(
    checkpoint: Path, out: Path, export_format: Format, dtype: torch.dtype | None = None
) -> Artifact:
    """Write a pruned ``checkpoint`` again, as ``export_format``, to the new folder ``out``.

    Args:
        checkpoint: A folder of ours.
        out: Must be absent or empty; appears whole at the end.
        export_format: How to store it.
        dtype: To round all weights to; None keeps theirs.

    Raises:
        ArtifactError: ``checkpoint`` is damaged, a weight is too large for ``dtype``, ``out`` is
            not empty, or the disk is full.
    """
    source = Artifact.open(checkpoint)
    manifest = json.dumps(source.manifest.to_json(), sort_keys=True)
    fingerprint = Fingerprint(
        {"format": export_format, "dtype": str(dtype), "checkpoint": manifest}
    )
    with RunFolder.claim(out) as run:
        require_space(run.path, source.checkpoint.weight_bytes)
        if run.begin(fingerprint):
            return _finished(out, export_format)
        artifact = EXPORTERS[export_format](source, run.fresh(export_format), dtype)
        run.publish(artifact.path)
    return replace(artifact, path=out)
