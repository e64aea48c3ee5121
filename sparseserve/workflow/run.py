"""The main job: from a dense model to a pruned checkpoint in the format that was asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import FORMATS, require_fit
from sparseserve.checkpoint.output_place import not_empty
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.run_folder import (
    Fingerprint,
    RunFolder,
    check_output,
    refuse_other_run,
)
from sparseserve.checkpoint.tensors import require_space
from sparseserve.checkpoint.verification import verify
from sparseserve.exporters import EXPORTERS, TensorRTSettings, export_packed24, export_tensorrt
from sparseserve.exporters.stored import write_stored
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import LayerStore, prune_model
from sparseserve.layerwise.plan import dense_reasons, ignored_modules, planned_operators
from sparseserve.report import PruneReport
from sparseserve.retraining.losses import DensePrediction, StoredPredictions, dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.retraining.state import StateFolder
from sparseserve.workflow.job import Job
from sparseserve.workflow.model_files import left_out, pruned_source
from sparseserve.workflow.needs import Needs
from sparseserve.workflow.opening import Opening, open_run
from sparseserve.workflow.quantizing import Rounded, round_weights
from sparseserve.workflow.time_estimate import estimated_seconds

#: Why a module stays dense that the recipe excludes.
AS_ASKED = "as asked"


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What a run would do.

    Attributes:
        pattern: Where zeros will be.
        operators: Full names and shapes of the linears to prune, in pruning order.
        dense_modules: Linears in decoder layers that stay dense.
        dense_reasons: Why, by name, of those that the recipe does not exclude.
        pruned_parameters: Parameters in the operators, before pruning.
        total_parameters: Parameters of the whole model, tied ones counted once.
        needs: What the run would take of memory and disk, estimated.
        seconds: What pruning the layers would take, estimated; None where nobody asked.
    """

    pattern: str
    operators: tuple[tuple[str, tuple[int, int]], ...]
    dense_modules: tuple[str, ...]
    dense_reasons: dict[str, str]
    pruned_parameters: int
    total_parameters: int
    needs: Needs
    seconds: float | None = None

    @property
    def lines(self) -> Iterator[str]:
        """What will be pruned, what it takes, and how many modules stay dense for which reason."""
        share = self.pruned_parameters / self.total_parameters
        yield (
            f"{len(self.operators)} operators with {self.pruned_parameters:,} of "
            f"{self.total_parameters:,} parameters ({share:.1%}) to {self.pattern}; about "
            f"{self.needs.memory_bytes / 2**30:.1f} GiB of memory and "
            f"{self.needs.disk_bytes / 2**30:.1f} GiB of disk"
        )
        reasons = Counter(self.dense_reasons.get(name, AS_ASKED) for name in self.dense_modules)
        for reason, count in reasons.items():
            yield f"{count} matrices of the layers stay dense: {reason}"


def plan(job: Job, out: Path | None = None, *, timed: bool = False) -> PrunePlan:
    """Find out what ``job`` would prune; rehearse it, write nothing.

    Args:
        job: What would be done.
        out: Where the result would go; None asks nothing of the disk.
        timed: Prune the first layer, to tell how long all of them would take.

    Raises:
        SparseServeError: Whatever would stop the run, at its beginning or at its end.
    """
    place = None if out is None else check_output(out)
    opening = open_run(job, place)
    if place is not None:
        refuse_other_run(place, opening.fingerprint)
    found = _plan_of(opening)
    return replace(found, seconds=estimated_seconds(opening)) if timed else found


def _plan_of(opening: Opening) -> PrunePlan:
    job, structure = opening.job, opening.structure
    operators = tuple(
        (f"{layer.name}.{item.name}", (item.out_features, item.in_features))
        for layer in structure.layers
        for item in planned_operators(layer, job.recipe)
    )
    parameters = opening.loaded.model.parameters()
    return PrunePlan(
        pattern=str(job.recipe.pattern),
        operators=operators,
        dense_modules=(*ignored_modules(structure, job.recipe), *dense_reasons(structure)),
        dense_reasons=dense_reasons(structure),
        pruned_parameters=sum(rows * columns for _, (rows, columns) in operators),
        total_parameters=sum(parameter.numel() for parameter in parameters),
        needs=opening.needs,
    )


def prune_and_export(job: Job, out: Path, *, store: LayerStore | None = None) -> Artifact:
    """Prune a model and write the checkpoint to the new folder ``out``.

    A run that is killed leaves ``OUT.partial``; the same call goes on from its last whole layer.

    Args:
        job: The model, and what to do with it.
        out: Must be absent or empty; appears whole at the end.
        store: Keeps finished layers; None for the run's own folder.

    Raises:
        SparseServeError: Any of its kinds; nothing is left at ``out``.
    """
    with RunFolder.claim(out) as run:
        opening = open_run(job, run.place)
        if run.begin(opening.fingerprint):
            return finished(out, job.stored_as)
        for line in _plan_of(opening).lines:
            job.progress.stage(line)
        layers = store or LayerFolder(run.path / "layers", run.path, job.progress)
        report = _prune(opening, run, layers)
        rounded = round_weights(opening, report, run)
        job.progress.stage("writing the checkpoint")
        artifact = _write(opening, rounded, run)
        run.publish(artifact.path)
    return replace(artifact, path=out)


def finished(out: Path, export_format: str) -> Artifact:
    """Return the result of a run that had died while it moved it to ``out``.

    Raises:
        ArtifactError: It is damaged, or in another format than this time.
    """
    artifact = verify(out)
    if artifact.manifest.format != export_format:
        raise not_empty(out)
    return artifact


def _write(opening: Opening, rounded: Rounded, run: RunFolder) -> Artifact:
    job = opening.job
    if names := left_out(opening.loaded):
        job.progress.stage(f"leaving out {len(names)} quantised tensors, such as {names[0]}")
    source = pruned_source(
        opening.loaded, job.recipe, opening.calibration, rounded.report, rounded.scales
    )
    if FORMATS[job.stored_as].storage is not None:
        return write_stored(source, run.fresh(job.stored_as), job.stored_as)
    # Other programs' forms are made from a checkpoint.
    dense = write_stored(source, run.fresh("dense"), "dense")
    job.progress.stage(f"packing as {job.stored_as}")
    return EXPORTERS[job.stored_as](dense, run.fresh(job.stored_as), None)


def _prune(opening: Opening, run: RunFolder, layers: LayerStore) -> PruneReport:
    """Prune the model in place, and retrain it if the recipe says so."""
    job = opening.job
    dense = _dense_predictions(opening, run)
    report = prune_model(
        opening.loaded.model,
        job.recipe,
        opening.calibration,
        store=layers,
        progress=job.progress,
        device=opening.job.runs_on,
        engine=job.engine,
        structure=opening.structure,
    )
    return _retrained(opening, report, dense, StateFolder(run.path / "training"))


def _dense_predictions(opening: Opening, run: RunFolder) -> Sequence[DensePrediction]:
    """Return what the dense model predicts, if the recipe retrains towards that."""
    model, knobs = opening.loaded.model, opening.job.recipe.retraining
    if not knobs.epochs or not knobs.distillation:
        return ()
    opening.job.progress.stage("recording the dense model's predictions")
    found = StoredPredictions.write(
        run.fresh("predictions"),
        dense_predictions(
            model.to(opening.job.runs_on), opening.calibration.for_retraining, knobs.likeliest
        ),
    )
    model.to("cpu")
    return found


def _retrained(
    opening: Opening, report: PruneReport, dense: Sequence[DensePrediction], store: StateFolder
) -> PruneReport:
    """Retrain the pruned model in place, if the recipe says so, and add that to the report."""
    model, windows = opening.loaded.model, opening.calibration.for_retraining
    knobs = opening.job.recipe.retraining
    if not knobs.epochs:
        return report

    def say(done: int, total: int, loss: float) -> None:
        if done % len(windows) == 0 or done == total:
            opening.job.progress.stage(f"retraining: {done} of {total} windows, loss {loss:.4f}")

    operators = [operator.name for operator in report.operators]
    model.to(opening.job.runs_on)
    with unstacked_experts(model):
        found = retrain(
            model,
            operators,
            windows,
            knobs,
            dense=dense,
            autocast_to=opening.job.recipe.autocast_to(opening.job.runs_on),
            store=store,
            on_window=say,
        )
    model.to("cpu")
    return replace(report, retraining=found, seconds=report.seconds + found.seconds)


def export(
    checkpoint: Path,
    out: Path,
    export_format: str,
    dtype: torch.dtype | None = None,
    *,
    tensorrt: TensorRTSettings | None = None,
    quantization: Quantization | None = None,
) -> Artifact:
    """Write a pruned ``checkpoint`` again, as ``export_format``, to the new folder ``out``.

    Args:
        checkpoint: A folder of ours.
        out: Must be absent or empty; appears whole at the end.
        export_format: How to store it.
        dtype: To round all weights to; None keeps theirs.
        tensorrt: What an engine is built for; None for any other format.
        quantization: How to round pruned weights, each to the nearest; None keeps what was done to
            them, where the format can hold it.

    Raises:
        RecipeError: ``export_format`` holds no quantised weights.
        ArtifactError: ``checkpoint`` is damaged, a weight is too large for ``dtype``, ``out`` is
            not empty, or the disk is full.
    """
    source = Artifact.open(checkpoint)
    require_fit(export_format, source.manifest.pattern, quantization)
    manifest = json.dumps(source.manifest.to_json(), sort_keys=True)
    fingerprint = Fingerprint(
        {
            "format": export_format,
            "dtype": str(dtype),
            "checkpoint": manifest,
            "tensorrt": str(tensorrt),
            "quantization": str(quantization),
        }
    )
    exporter = EXPORTERS[export_format]
    if tensorrt is not None:
        exporter = partial(export_tensorrt, settings=tensorrt)
    if quantization is not None and FORMATS[export_format].quantizes:
        exporter = partial(export_packed24, quantization=quantization)
    with RunFolder.claim(out) as run:
        require_space(run.path, source.checkpoint.weight_bytes)
        if run.begin(fingerprint):
            return finished(out, export_format)
        artifact = exporter(source, run.fresh(export_format), dtype)
        run.publish(artifact.path)
    return replace(artifact, path=out)
