"""What a run will take of memory and disk, told from the structure of the model.

The model itself is not counted in memory: its weights are mapped from their files, and the system
drops the pages of a file when memory is needed for something else. What counts is one decoder
layer, twice, with the statistics and the solver of its widest operators or its training, and
the output head where the last layer is trained towards predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparseserve.checkpoint.formats import FORMATS
from sparseserve.devices import pruning_dtype
from sparseserve.errors import RecipeError
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.layerwise.expert_statistics import BLOCK_BYTES
from sparseserve.machine import this_machine
from sparseserve.models.loading import LoadedModel
from sparseserve.models.structure import LayerStructure, ModelStructure, OperatorGroup
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.solvers.statistics import moment_bytes
from sparseserve.text.calibration import CalibrationSet
from sparseserve.workflow.job import Job

_FLOAT = 4
# Matrices of a solver, each as large as a second moment or as the stacked weights: its factors,
# its right side, and the candidates that it compares. benchmarks/quality/layer_memory.py measures
# runs against the whole estimate.
_SOLVER_MOMENTS = 7
_SOLVER_WEIGHTS = 6
# A trained parameter, its gradient, two moments of Adam, the best epoch's value, and its mask.
_TRAINED = 5.25 * _FLOAT
# What the program itself takes: Python, torch, transformers, and what the allocator holds back.
_PROGRAM = 640 * 2**20


@dataclass(frozen=True, slots=True)
class Needs:
    """Estimates.

    Attributes:
        memory_bytes: On the device that prunes; without what is mapped from files.
        disk_bytes: At most, in the folder of the output.
    """

    memory_bytes: int
    disk_bytes: int


def needs_of(
    job: Job, loaded: LoadedModel, structure: ModelStructure, calibration: CalibrationSet
) -> Needs:
    """Estimate what a run takes.

    Args:
        job: How the model is pruned and stored, and where.
        loaded: The model.
        structure: Its layers.
        calibration: What it is pruned with.
    """
    recipe, device = job.recipe, job.runs_on
    item = pruning_dtype(next(loaded.model.parameters()).dtype, device).itemsize
    with unstacked_experts(loaded.model):
        largest = max(
            _layer_bytes(loaded.model.get_submodule(layer.name), layer, job, calibration, item)
            for layer in structure.layers
        )
    largest = max(largest, _retraining_bytes(loaded.model, structure, recipe))
    head = loaded.model.get_output_embeddings()
    trained = recipe.reconstruction.epochs > 0
    predicting = _FLOAT * _parameters(head) if trained and isinstance(head, nn.Module) else 0
    return Needs(
        memory_bytes=int(_PROGRAM + largest + predicting),
        disk_bytes=_disk_bytes(job, loaded, structure, calibration),
    )


def require_memory(needs: Needs, device: torch.device) -> None:
    """Refuse a run that cannot fit.

    Raises:
        RecipeError: Names both figures.
    """
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], str(device)
    else:
        free, where = this_machine().free_bytes, "this machine"
    if free and needs.memory_bytes > free:
        raise RecipeError(
            f"pruning takes about {needs.memory_bytes / 2**30:.1f} GiB of memory, and {where} has "
            f"{free / 2**30:.1f} GiB free: --reconstruct 0 trains no layers, --error-correction "
            "none keeps a third of the statistics, and a smaller --sequence-length helps"
        )


def _layer_bytes(
    module: nn.Module,
    layer: LayerStructure,
    job: Job,
    calibration: CalibrationSet,
    item: int,
) -> float:
    recipe, parameters = job.recipe, _parameters(module)
    solving = max((_group_bytes(group, layer, recipe) for group in layer.groups), default=0)
    training = 0.0
    if recipe.reconstruction.epochs:
        tokens = max(len(window) for window in calibration.windows)
        outputs = sum(operator.out_features for operator in layer.operators)
        # What the backward pass keeps: about the inputs and outputs of every operator.
        training = _TRAINED * parameters + 3 * _FLOAT * tokens * outputs
        if (rounded_to := recipe.autocast_to(job.runs_on)) is not None:
            # The backward pass keeps the rounded weights.
            training += rounded_to.itemsize * parameters
    # The dense layer and the pruned one; where values are rotated, the dense one a second time.
    copies = 2 if recipe.rotate == "none" else 3
    return copies * item * parameters + max(solving, training)


def _retraining_bytes(model: nn.Module, structure: ModelStructure, recipe: PruneRecipe) -> float:
    """Return what training the whole model takes: on a CPU it computes in float32."""
    knobs = recipe.retraining
    if not knobs.epochs:
        return 0.0
    operators = [operator for layer in structure.layers for operator in layer.operators]
    # The weight with its update, which the backward pass keeps.
    updated = _FLOAT * sum(item.out_features * item.in_features for item in operators)
    trained = _TRAINED * _retrained_weights(structure, recipe)
    return _FLOAT * _parameters(model) + updated + trained


def _retrained_weights(structure: ModelStructure, recipe: PruneRecipe) -> int:
    """Return how many values training of the whole model changes, but for vectors."""
    knobs = recipe.retraining
    return sum(
        item.out_features * item.in_features
        if knobs.every_weight
        else knobs.rank * (item.out_features + item.in_features)
        for layer in structure.layers
        for item in layer.operators
    )


def _group_bytes(group: OperatorGroup, layer: LayerStructure, recipe: PruneRecipe) -> float:
    width = group.in_features
    moments = 3 if recipe.correction.needs_dense and recipe.correction.paired else 1
    # The sums, and where inputs are paired the mixed ones made of them.
    statistics = (2 * moments if moments > 1 else 1) * moment_bytes(width)
    if group.experts is not None:
        alike = sum(other.experts == group.experts for other in layer.groups)
        statistics += min(BLOCK_BYTES, alike * moments * moment_bytes(width))
    rows = sum(operator.out_features for operator in group.operators)
    return statistics + _FLOAT * (_SOLVER_MOMENTS * width**2 + _SOLVER_WEIGHTS * rows * width)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _disk_bytes(
    job: Job, loaded: LoadedModel, structure: ModelStructure, calibration: CalibrationSet
) -> int:
    """Return what the pruned layers, the checkpoint and hidden states take."""
    recipe, device = job.recipe, job.runs_on
    weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
    windows = (*calibration.windows, *calibration.scrambled)
    tokens = sum(map(len, windows))
    item = pruning_dtype(next(loaded.model.parameters()).dtype, device).itemsize
    inputs = [
        [group.operators[0].in_features for group in layer.common_groups]
        for layer in structure.layers
    ]
    # What enters and leaves a layer, and on a CPU what its operators read.
    hidden = next(width for widths in inputs for width in widths)
    width = 2 * hidden + (max(map(sum, inputs)) if device.type == "cpu" else 0)
    retraining = 0
    if recipe.retraining.epochs:
        # Of each value its own, two moments and the best epoch's; twice while one state is saved.
        retraining = 2 * 4 * _FLOAT * _retrained_weights(structure, recipe)
    if recipe.retraining.epochs and recipe.retraining.distillation:
        predicted = sum(map(len, calibration.for_retraining))
        retraining += 12 * (recipe.retraining.likeliest + 1) * predicted
    # The layers, and the result; what is not stored as a checkpoint is made from a dense one.
    copies = 3 if FORMATS[job.stored_as].storage is None else 2
    # Layers that are rounded are kept beside the pruned ones until the end.
    copies += bool(recipe.quantization)
    needed: int = copies * weights + tokens * width * item + retraining
    return needed
