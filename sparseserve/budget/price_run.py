"""Measuring the sensitivities of a model in a folder that a killed run can go on in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparseserve.budget.prices import UnitSensitivity, measure_sensitivities
from sparseserve.checkpoint.output_place import not_empty
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.run_folder import RunFolder
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.devices import pruning_dtype
from sparseserve.errors import RecipeError
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import prune_model
from sparseserve.models.loading import load_model
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.retraining.settings import Retraining
from sparseserve.text import TextFile, read_text, vocabulary_size
from sparseserve.text.calibration import CalibrationSet
from sparseserve.text.held_out import held_out_windows, spread_places
from sparseserve.text.windows import require_known_tokens
from sparseserve.workflow.job import Job
from sparseserve.workflow.opening import Opening, open_run, with_part

# Calibration windows that the units are pruned with when they are pruned alone.
_WINDOWS_ALONE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSpec:
    """What to measure on; nothing of it is seen by pruning.

    Attributes:
        texts: Files, folders or dataset names; none is what calibration leaves of its own text.
        sensitivity_windows: Windows of each text that sensitivities are measured on.
        validation_windows: Other windows of each text, that pruned models are judged on.
    """

    texts: tuple[str, ...] = ()
    sensitivity_windows: int = 4
    validation_windows: int = 32

    def __post_init__(self) -> None:
        if self.sensitivity_windows < 1 or self.validation_windows < 2:
            raise RecipeError(
                f"{self.sensitivity_windows} windows for sensitivities and "
                f"{self.validation_windows} for validation: at least 1 and 2 are needed"
            )


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """The windows of one text, token ids of the length of the calibration windows."""

    name: str
    files: tuple[TextFile, ...]
    sensitivity: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class SensitivityRun:
    """An opened run.

    Attributes:
        job: The dense model, and how it would be pruned.
        folder: Where everything unfinished lies.
        calibration: What it would be pruned with.
        texts: What is measured on.
        dtype: What models compute in.
        dense_bytes: Size of the dense model's parameters in the dtype of the recipe.
    """

    job: Job
    folder: RunFolder
    calibration: CalibrationSet
    texts: tuple[HeldOutText, ...]
    dtype: torch.dtype
    dense_bytes: int

    @classmethod
    @contextmanager
    def open(cls, job: Job, out: Path, spec: HeldOutSpec) -> Iterator[SensitivityRun]:
        """Start a run that will end in the new folder ``out``, or go on with an unfinished one.

        The folder of the run is this process's while the block runs.

        Raises:
            SparseServeError: The model or a text cannot be used, the run could not end well, or
                ``out`` is not empty.
        """
        with RunFolder.claim(out) as folder:
            yield cls._opened(folder, open_run(job, folder.place), spec)

    @classmethod
    def _opened(cls, folder: RunFolder, opening: Opening, spec: HeldOutSpec) -> SensitivityRun:
        loaded, calibration = opening.loaded, opening.calibration
        texts = _held_out_texts(spec, opening.job.recipe, calibration, loaded.tokenizer)
        for text in texts:
            windows = (*text.sensitivity, *text.validation)
            require_known_tokens(text.name, windows, vocabulary_size(loaded.model.config))
        held_out = [asdict(spec), [asdict(file) for text in texts for file in text.files]]
        if folder.begin(with_part(opening.fingerprint, "held-out text", held_out)):
            raise not_empty(folder.out)  # with which goal it was made is not known
        return cls(
            job=opening.job,
            folder=folder,
            calibration=calibration,
            texts=texts,
            dtype=pruning_dtype(next(loaded.model.parameters()).dtype, opening.job.runs_on),
            dense_bytes=sum(parameter.nbytes for parameter in loaded.model.parameters()),
        )

    def sensitivities(self) -> tuple[UnitSensitivity, ...]:
        """Measure every unit that the recipe would prune, each alone, or read what was measured.

        The weights are those of SparseGPT on dense inputs: a price should not depend on what else
        is pruned, and most methods agree on which operators are expensive.

        Raises:
            SparseServeError: The model cannot be pruned or run.
        """
        progress = self.job.progress
        stored = self.folder.path / "sensitivities.json"
        units = _read_units(stored)
        if units is None:
            folder = self.folder.path / "alone"
            store = _AloneFolder(LayerFolder(folder / "layers", folder, progress))
            progress.stage("pruning every operator alone")
            self._prune_alone(store.layers)
            progress.stage("measuring what each costs")
            model = load_model(self.job.source, dtype=self.dtype).model.to(self.job.runs_on)
            windows = [window for text in self.texts for window in text.sensitivity]
            units = measure_sensitivities(
                model, self.job.recipe, windows, store, on_layer=progress.layer_started
            )
            write_sealed(stored, [asdict(unit) for unit in units])
        return units

    def _prune_alone(self, store: LayerFolder) -> None:
        recipe = pricing_recipe(self.job.recipe)
        every = max(len(self.calibration.windows) // _WINDOWS_ALONE, 1)
        windows = self.calibration.windows[::every][:_WINDOWS_ALONE]
        prune_model(
            load_model(self.job.source, dtype=recipe.torch_dtype).model,
            recipe,
            CalibrationSet(windows, self.calibration.record),
            store=store,
            progress=self.job.progress,
            device=self.job.runs_on,
            engine=self.job.engine,
        )


def pricing_recipe(recipe: PruneRecipe) -> PruneRecipe:
    """Return how operators are pruned alone to price them; the same ones as ``recipe`` prunes."""
    return replace(
        recipe,
        pruner=SparseGPT(),
        error_correction="none",
        reconstruction=Reconstruction(epochs=0),
        retraining=Retraining(epochs=0),
        quantization=Quantization(),
        rotate="none",  # a rotated operator fits no layer that is dense otherwise
    )


@dataclass(frozen=True, slots=True)
class _AloneFolder:
    """The operators pruned alone, and beside each layer's what was measured of it."""

    layers: LayerFolder

    def pruned(self, layer: str) -> PrunedLayer:
        """Return a pruned layer."""
        found = self.layers.load(layer)
        if found is None:
            raise ValueError(f"{layer} was not pruned")
        return found

    def load(self, layer: str) -> tuple[UnitSensitivity, ...] | None:
        """Return the units of a layer that was measured before, or None."""
        return _read_units(self._path(layer))

    def save(self, layer: str, units: tuple[UnitSensitivity, ...]) -> None:
        """Keep the units of a layer."""
        write_sealed(self._path(layer), [asdict(unit) for unit in units])

    def _path(self, layer: str) -> Path:
        return self.layers.scratch / f"{layer}.json"


def _read_units(path: Path) -> tuple[UnitSensitivity, ...] | None:
    """Return what was stored; None if that is not there, or not as it was stored."""
    units = read_sealed(path)
    if not isinstance(units, list):
        return None
    return tuple(UnitSensitivity.from_json(unit) for unit in units)


def _held_out_texts(
    spec: HeldOutSpec,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[HeldOutText, ...]:
    """Cut the windows; those for sensitivities lie spread between those for validation."""
    texts = []
    count = spec.sensitivity_windows + spec.validation_windows
    chosen = spread_places(spec.sensitivity_windows, count)
    for name in spec.texts or (recipe.calibration.source,):
        # The column is that of the calibration text; validation texts may be plain ones.
        source = read_text(
            name, column=recipe.calibration.text_column, prose_has_no_column=name in spec.texts
        )
        windows = held_out_windows(
            tokenizer,
            source,
            used=(*calibration.windows, *calibration.fresh),
            samples=count,
            sequence_length=calibration.record.sequence_length,
            purpose="measure the perplexity",
            remedy="another text with --validation",
        )
        texts.append(
            HeldOutText(
                source.name,
                source.files,
                tuple(window for i, window in enumerate(windows) if i in chosen),
                tuple(window for i, window in enumerate(windows) if i not in chosen),
            )
        )
    return tuple(texts)
