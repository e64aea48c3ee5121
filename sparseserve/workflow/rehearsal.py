"""A rehearsal of everything that writing the result will need, before any operator is pruned.

A run, ``--dry-run``, sensitivities and the budget all pass through :func:`rehearse`: what would
stop a run at its end stops it here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.output_place import OutputPlace
from sparseserve.checkpoint.storage import storage_of
from sparseserve.checkpoint.tensors import Checkpoint, require_space, write_checkpoint
from sparseserve.errors import ArtifactError, SparseServeError, UnsupportedModelError, first_line
from sparseserve.exporters.onnx.graph import require_keys_and_values
from sparseserve.exporters.side_files import copy_side_files, write_config
from sparseserve.huggingface.experts import ExpertLinears, unstacked_experts
from sparseserve.huggingface.names import StoredModule, stored_modules
from sparseserve.huggingface.opening import open_config, open_tokenizer
from sparseserve.layerwise.plan import check_plan, planned_operators
from sparseserve.layerwise.trial import TRIED_TOKENS, try_layers
from sparseserve.models.loading import LoadedModel
from sparseserve.models.saving import stored_tensors
from sparseserve.models.structure import ModelStructure, trace_structure
from sparseserve.paths import local_path
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.text.calibration import CalibrationSet
from sparseserve.workflow.job import Job
from sparseserve.workflow.model_files import copied_from, model_settings
from sparseserve.workflow.needs import Needs, needs_of, require_memory


def rehearse(
    job: Job, loaded: LoadedModel, calibration: CalibrationSet, place: OutputPlace | None
) -> tuple[ModelStructure, Needs]:
    """Try all that a run does with the model but pruning.

    Args:
        job: What would be done. The rehearsal itself needs no more than a CPU.
        loaded: The model; not changed.
        calibration: What it would be done with.
        place: Where the result would go; None asks nothing of the disk.

    Returns:
        The structure of the model, and what the run will take.

    Raises:
        UnsupportedModelError: The structure cannot be found, a layer cannot be run alone or
            trained, or an operator is stored in another form.
        RecipeError: An operator does not fit the pattern, there are too few windows, or memory is
            too small.
        ArtifactError: The format cannot hold the result, the disk is too small, or a file that goes
            with the weights is missing.
    """
    model, recipe = loaded.model, job.recipe
    with unstacked_experts(model):
        structure = trace_structure(model, calibration.windows[0][:TRIED_TOKENS])
        check_plan(structure, recipe)
        _rehearse_storing(model, structure, recipe, job.stored_as)
    needs = needs_of(job, loaded, structure, calibration)
    require_memory(needs, job.runs_on)
    if place is not None:
        there = sum(path.stat().st_size for path in place.partial.rglob("*") if path.is_file())
        require_space(place.partial, needs.disk_bytes - there)
    with _temporary_folder() as scratch:
        _rehearse_writing(loaded, structure, recipe, scratch / "model")
    with unstacked_experts(model):
        try_layers(model, structure, recipe, calibration, recipe.autocast_to(job.runs_on))
    return structure, needs


def _rehearse_storing(
    model: PreTrainedModel, structure: ModelStructure, recipe: PruneRecipe, export_format: str
) -> None:
    """Put a row of each width and dtype that is to be pruned into the form it is stored in."""
    if FORMATS[export_format].storage is None:
        _rehearse_graph(model, structure, recipe, export_format)
        return
    storage = storage_of(export_format)
    seen = set()
    for layer in structure.layers:
        for operator in planned_operators(layer, recipe):
            name = layer.full_name(operator)
            dtype = storage.kept_dtype(model.get_parameter(f"{name}.weight").dtype)
            if (operator.in_features, dtype) in seen:
                continue
            seen.add((operator.in_features, dtype))
            try:
                storage.stored(torch.zeros(1, operator.in_features, dtype=dtype), transposed=False)
            except (SparseServeError, RuntimeError) as error:
                raise ArtifactError(
                    f"{name}: {export_format} cannot hold rows of {operator.in_features} in "
                    f"{dtype} ({error}): use --format dense"
                ) from error


def _rehearse_graph(
    model: PreTrainedModel, structure: ModelStructure, recipe: PruneRecipe, export_format: str
) -> None:
    """Refuse what a graph cannot hold, as far as that is seen without exporting one."""
    require_keys_and_values(model)
    for layer in structure.layers:
        for operator in planned_operators(layer, recipe):
            name = layer.full_name(operator)
            if _owner_of_experts(model, name) is not None:
                raise ArtifactError(
                    f"{name}: {export_format} has all experts of a layer in one product, where "
                    "none can be told to be pruned: use --experts dense or --format dense"
                )


def _owner_of_experts(model: nn.Module, module: str) -> ExpertLinears | None:
    """Return the experts, unstacked, that ``module`` is a linear of; None if of none."""
    owner = model.get_submodule(module.rpartition(".")[0].rpartition(".")[0])
    return owner if isinstance(owner, ExpertLinears) else None


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Give a folder for the time of the block.

    It lies where temporary files do: one beside the output would be in the way of the next run,
    were this one killed.

    Raises:
        ArtifactError: It cannot be made or filled, where another output folder would not help.
    """
    remedy = "make room there, or name another folder for temporary files with TMPDIR"
    try:
        made = tempfile.TemporaryDirectory(prefix="sparseserve-")
    except OSError as error:
        raise ArtifactError(f"no temporary folder: {first_line(error)}: {remedy}") from error
    with made as scratch:
        try:
            yield Path(scratch)
        except (ArtifactError, OSError) as error:
            cause = error.__cause__ if isinstance(error, ArtifactError) else error
            failed = isinstance(cause, OSError | SafetensorError)
            if cause is None or not failed or scratch not in str(error):
                raise
            raise ArtifactError(
                f"{scratch}: the rehearsal cannot write there ({first_line(cause)}): {remedy}"
            ) from error


def _rehearse_writing(
    loaded: LoadedModel, structure: ModelStructure, recipe: PruneRecipe, folder: Path
) -> None:
    """Write the model with one row of each matrix, and open what was written."""
    _refuse_outside_tokenizer(loaded)
    copied_from(loaded)
    write_checkpoint(folder, stored_tensors(loaded.model, first_rows=True))
    copy_side_files(loaded.folder, folder)
    write_config(loaded.folder, folder, model_settings(loaded, recipe))
    stored = Checkpoint.open(folder)
    planned = [
        layer.full_name(operator)
        for layer in structure.layers
        for operator in planned_operators(layer, recipe)
    ]
    places = stored_modules(loaded.model, planned)
    with unstacked_experts(loaded.model):
        for module in planned:
            place = places.get(module)
            if place is None or not _is_written(loaded.model, module, stored, place):
                raise UnsupportedModelError(
                    f"{loaded.folder}: {module}.weight is stored in another form, so it cannot be "
                    "exported: save the model with transformers' save_pretrained(FOLDER, "
                    "save_original_format=False) and prune that folder"
                )
    _require_same_tokenizer(loaded, folder)


def _is_written(model: nn.Module, module: str, stored: Checkpoint, place: StoredModule) -> bool:
    """Whether the first row of a matrix, or the first expert, is where it should be."""
    if place.stack is not None:
        # Whether a stack is turned when it is saved may depend on its whole shape.
        return place.stack.tensor in stored
    if _owner_of_experts(model, module) is not None and module.split(".")[-2] != "0":
        return True  # a model of first rows has no other experts
    name = f"{place.name}.weight"
    if name not in stored:
        return False
    found, weight = stored.tensor(name), model.get_parameter(f"{module}.weight")
    # Of an expert, only the first inputs are there.
    return found.ndim == 2 and torch.equal(found, weight[: len(found), : found.shape[1]])


def _refuse_outside_tokenizer(loaded: LoadedModel) -> None:
    """Refuse a tokenizer that reads a file from outside the model's folder."""
    where = loaded.folder / "tokenizer_config.json"
    if not where.is_file():
        return
    settings = json.loads(where.read_text(encoding="utf-8"))
    for key in type(loaded.tokenizer).vocab_files_names:
        value = settings.get(key)
        if not isinstance(value, str):
            continue
        file = local_path(loaded.folder / value, f"{where}: {key}", UnsupportedModelError)
        if file.is_file() and not file.absolute().is_relative_to(loaded.folder.absolute()):
            raise UnsupportedModelError(
                f"{where}: {key} names {value}, outside the model's folder: copy that file into "
                "the folder and name it there"
            )


def _require_same_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """Refuse a model whose configuration or tokenizer reads otherwise from a copy of its files."""
    try:
        open_config(folder)
        copied = open_tokenizer(folder)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{loaded.folder}: a copy of its files cannot be opened ({error}): "
            "keep everything that the tokenizer needs in the model's folder"
        ) from error
    own = loaded.tokenizer
    for what, same in (
        ("vocabulary", own.get_vocab() == copied.get_vocab()),
        ("special tokens", own.special_tokens_map == copied.special_tokens_map),
        ("chat template", own.chat_template == copied.chat_template),
    ):
        if not same:
            raise UnsupportedModelError(
                f"{loaded.folder}: a copy of its tokenizer has another {what}, so part of it lies "
                "elsewhere: keep everything that the tokenizer needs in the model's folder"
            )
