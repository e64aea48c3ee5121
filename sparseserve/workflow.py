"""The main job: from a dense model to a pruned checkpoint in the format that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparseserve.checkpoint.artifact import Artifact, Format, Manifest, write_manifest
from sparseserve.checkpoint.tensors import Checkpoint, require_space, writing
from sparseserve.devices import default_device
from sparseserve.errors import UnsupportedModelError
from sparseserve.exporters import EXPORTERS
from sparseserve.exporters.packed24 import require_two_four
from sparseserve.exporters.side_files import copy_side_files
from sparseserve.layerwise.layer import PruneProgress, Silence, planned_operators
from sparseserve.layerwise.pipeline import LayerStore, check_plan, ignored_modules, prune_model
from sparseserve.layerwise.run_folder import RunFolder, require_free
from sparseserve.models.loading import LoadedModel, load_model
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import PruneReport
from sparseserve.retraining.losses import DensePrediction, StoredPredictions, dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.text import position_limit, vocabulary_size
from sparseserve.text.calibration import CalibrationSet, load_calibration


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


def plan(source: str, recipe: PruneRecipe) -> PrunePlan:
    """Find out what ``recipe`` would prune in the model ``source``, pruning nothing.

    Raises:
        UnsupportedModelError: The model cannot be loaded or its structure found.
        RecipeError: An operator does not fit the pattern.
    """
    loaded = load_model(source, dtype=recipe.torch_dtype)
    structure = trace_structure(loaded.model, _probe())
    check_plan(structure, recipe)
    operators = tuple(
        (f"{layer.name}.{item.name}", (item.out_features, item.in_features))
        for layer in structure.layers
        for item in planned_operators(layer, recipe)
    )
    return PrunePlan(
        operators=operators,
        dense_modules=ignored_modules(structure, recipe),
        pruned_parameters=sum(rows * columns for _, (rows, columns) in operators),
        total_parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
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
    require_free(out)
    if export_format == "packed24":
        require_two_four(str(recipe.pattern))
    on_stage(f"loading {source}")
    loaded = load_model(source, dtype=recipe.torch_dtype)
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    require_space(out, 3 * model_bytes)
    on_stage("reading calibration text")
    config = loaded.model.config
    calibration = load_calibration(
        recipe.calibration, loaded.tokenizer, position_limit(config), vocabulary_size(config)
    )
    fingerprint: dict[str, object] = {
        "recipe": recipe.to_json(),
        "model": source_fingerprint(source, loaded),
        "calibration": calibration.record.digest,
    }
    run = RunFolder.open(out, fingerprint)
    device = device or default_device()
    dense = _dense_predictions(
        loaded.model, recipe, calibration, run=run, device=device, on_stage=on_stage
    )
    on_stage("finding the model's structure")
    report = prune_model(
        loaded.model,
        recipe,
        calibration,
        store=store or run,
        progress=progress or Silence(),
        device=device,
    )
    report = _retrained(
        loaded.model, recipe, calibration, report, dense, device=device, on_stage=on_stage
    )
    on_stage("writing the checkpoint")
    artifact = _write_dense(run.fresh("dense"), loaded, recipe, calibration, report)
    if export_format != "dense":
        on_stage(f"packing as {export_format}")
        artifact = EXPORTERS[export_format](artifact, run.fresh(export_format), None)
    run.publish(artifact.path)
    return replace(artifact, path=out)


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


def source_fingerprint(source: str, loaded: LoadedModel) -> str:
    """Identify the weights of ``source`` without reading them all.

    A local file is known by name, size and time of change, a hub model by its snapshot's name.
    """
    if not Path(source).is_dir():
        return f"{source}@{loaded.folder.name}"
    stats = [(path.name, path.stat()) for path in sorted(loaded.folder.glob("*.safetensors"))]
    return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


def _write_dense(
    folder: Path,
    loaded: LoadedModel,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    report: PruneReport,
) -> Artifact:
    with writing(folder):
        loaded.model.save_pretrained(folder, max_shard_size="5GB")
        for shard in folder.glob("*.safetensors"):
            shard.chmod((folder / "config.json").stat().st_mode)  # else only the owner may read
    copy_side_files(loaded.folder, folder)
    names = [operator.name for operator in report.operators]
    checkpoint = Checkpoint.open(folder)
    for name in names:
        if f"{name}.weight" not in checkpoint:
            raise UnsupportedModelError(
                f"{name}: its weight is saved under another name, so it cannot be exported"
            )
    manifest = Manifest(
        format="dense",
        pattern=str(recipe.pattern),
        pruned=tuple(names),
        transposed=tuple(operator.name for operator in report.operators if operator.transposed),
        source=str(loaded.source),
        recipe=recipe.to_json(),
        calibration=asdict(calibration.record),
        report=report.to_json(),
        files={},
    )
    return write_manifest(folder, manifest)


def _probe() -> torch.Tensor:
    """Return a short token window ``[1, 8]`` to trace with; structure depends on no token."""
    return torch.arange(8)[None]


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
    run = RunFolder.open(
        out, {"export": export_format, "dtype": str(dtype), "of": asdict(source.manifest)}
    )
    artifact = EXPORTERS[export_format](source, run.fresh(export_format), dtype)
    run.publish(artifact.path)
    return replace(artifact, path=out)
