"""Measuring the sensitivities of a model in a folder that a killed run can go on in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparseserve.budget.prices import UnitSensitivity, measure_sensitivities
from sparseserve.checkpoint.tensors import read_json, write_json
from sparseserve.devices import default_device
from sparseserve.errors import RecipeError
from sparseserve.layerwise.layer import PrunedLayer, PruneProgress
from sparseserve.layerwise.pipeline import prune_model
from sparseserve.layerwise.run_folder import RunFolder, require_free
from sparseserve.models.loading import load_model
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.text import TextFile, position_limit, read_text, vocabulary_size
from sparseserve.text.calibration import CalibrationSet, load_calibration
from sparseserve.text.held_out import held_out_windows
from sparseserve.text.windows import require_known_tokens
from sparseserve.workflow import source_fingerprint

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
        """Check the numbers."""
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
        source: The dense model, a folder or a hub name.
        recipe: How it would be pruned.
        folder: Where everything unfinished lies.
        calibration: What it would be pruned with.
        texts: What is measured on.
        device: Where models run.
        dense_bytes: Size of the dense model's parameters in the dtype of the recipe.
    """

    source: str
    recipe: PruneRecipe
    folder: RunFolder
    calibration: CalibrationSet
    texts: tuple[HeldOutText, ...]
    device: torch.device
    dense_bytes: int

    @classmethod
    def open(
        cls,
        source: str,
        out: Path,
        recipe: PruneRecipe,
        spec: HeldOutSpec,
        device: torch.device | None,
    ) -> SensitivityRun:
        """Start a run that will end in the new folder ``out``, or go on with an unfinished one.

        Raises:
            SparseServeError: The model or a text cannot be used, or ``out`` is not empty.
        """
        require_free(out)
        loaded = load_model(source, dtype=recipe.torch_dtype)
        config = loaded.model.config
        calibration = load_calibration(
            recipe.calibration, loaded.tokenizer, position_limit(config), vocabulary_size(config)
        )
        texts = _held_out_texts(spec, recipe, calibration, loaded.tokenizer)
        for text in texts:
            windows = (*text.sensitivity, *text.validation)
            require_known_tokens(text.name, windows, vocabulary_size(config))
        fingerprint: dict[str, object] = {
            "recipe": recipe.to_json(),
            "model": source_fingerprint(source, loaded),
            "calibration": calibration.record.digest,
            "held out": [asdict(spec), [asdict(file) for text in texts for file in text.files]],
        }
        return cls(
            source=source,
            recipe=recipe,
            folder=RunFolder.open(out, fingerprint),
            calibration=calibration,
            texts=texts,
            device=device or default_device(),
            dense_bytes=sum(parameter.nbytes for parameter in loaded.model.parameters()),
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """What to measure in; None is the model's own. CPUs are slow in 16 bits, and inexact."""
        return torch.float32 if self.device.type == "cpu" else self.recipe.torch_dtype

    def sensitivities(
        self, progress: PruneProgress, on_stage: Callable[[str], None]
    ) -> tuple[UnitSensitivity, ...]:
        """Measure every unit that the recipe would prune, each alone, or read what was measured.

        The weights are those of SparseGPT on dense inputs: a price should not depend on what else
        is pruned, and most methods agree on which operators are expensive.

        Raises:
            SparseServeError: The model cannot be pruned or run.
        """
        stored = self.folder.path / "sensitivities.json"
        if not stored.exists():
            folder = self.folder.path / "alone"
            (folder / "layers").mkdir(parents=True, exist_ok=True)
            store = _AloneFolder(RunFolder(folder, self.folder.out))
            on_stage("pruning every operator alone")
            self._prune_alone(store.layers, progress)
            on_stage("measuring what each costs")
            model = load_model(self.source, dtype=self.dtype).model.to(self.device)
            windows = [window for text in self.texts for window in text.sensitivity]
            units = measure_sensitivities(
                model, self.recipe, windows, store, on_layer=progress.layer_started
            )
            write_json(stored, {"units": [asdict(unit) for unit in units]})
        return _read_units(stored)

    def _prune_alone(self, store: RunFolder, progress: PruneProgress) -> None:
        recipe = PruneRecipe(
            pattern=self.recipe.pattern,
            pruner=SparseGPT(),
            error_correction="none",
            reconstruction=Reconstruction(epochs=0),
            calibration=self.recipe.calibration,
            ignore=self.recipe.ignore,
            dtype=self.recipe.dtype,
        )
        every = max(len(self.calibration.windows) // _WINDOWS_ALONE, 1)
        windows = self.calibration.windows[::every][:_WINDOWS_ALONE]
        prune_model(
            load_model(self.source, dtype=recipe.torch_dtype).model,
            recipe,
            CalibrationSet(windows, self.calibration.record),
            store=store,
            progress=progress,
            device=self.device,
        )


@dataclass(frozen=True, slots=True)
class _AloneFolder:
    """The operators pruned alone, and beside each layer's what was measured of it."""

    layers: RunFolder

    def pruned(self, layer: str) -> PrunedLayer:
        """Return a pruned layer."""
        found = self.layers.load(layer)
        if found is None:
            raise ValueError(f"{layer} was not pruned")
        return found

    def load(self, layer: str) -> tuple[UnitSensitivity, ...] | None:
        """Return the units of a layer that was measured before, or None."""
        stored = self._path(layer)
        return _read_units(stored) if stored.exists() else None

    def save(self, layer: str, units: tuple[UnitSensitivity, ...]) -> None:
        """Keep the units of a layer."""
        write_json(self._path(layer), {"units": [asdict(unit) for unit in units]})

    def _path(self, layer: str) -> Path:
        return self.layers.path / f"{layer}.json"


def _read_units(path: Path) -> tuple[UnitSensitivity, ...]:
    units = read_json(path)["units"]
    assert isinstance(units, list)
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
    chosen = {
        (2 * i + 1) * count // (2 * spec.sensitivity_windows)
        for i in range(spec.sensitivity_windows)
    }
    for name in spec.texts or (recipe.calibration.source,):
        # The column is that of the calibration text; validation texts may be plain ones.
        source = read_text(
            name, column=recipe.calibration.text_column, prose_has_no_column=name in spec.texts
        )
        windows = held_out_windows(
            tokenizer,
            source,
            used=calibration.windows,
            samples=count,
            sequence_length=calibration.record.sequence_length,
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
