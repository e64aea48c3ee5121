"""Pruning a model: the whole of it, one decoder layer at a time.

For every layer, on all calibration windows, the first layers on scrambled copies of them, too:

1. Copy the layer twice: one copy stays dense, the other is pruned. Run the dense one to the next
   layer's inputs. If the recipe asks for it, rotate the values of its attention, which
   changes nothing that it computes, so that less is lost.
2. For each group of operators that read the same input, in the order in which data reaches them:
   run both copies up to that input (on a CPU the dense one's is kept from step 1 instead), sum
   its second moments, and prune the group's weights.
   With ``intra`` error correction the inputs of the pruned copy (``X*``) carry the errors of the
   operators pruned before, and the target stays the dense output ``W0 X``.
3. If the recipe asks for it, train the kept weights of the whole layer towards its dense output,
   features weighed by how much later layers read them, or the last towards dense predictions.
4. Write the layer to disk. With a correction across layers, run it to what the next one sees.

With ``none`` and ``intra`` every layer starts from dense hidden states, so layers are independent
of each other. Then another engine may prune them elsewhere (``distributed/ray_engine.py``). A run
that was killed goes on with the layers that are not on disk and ends with the same weights.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sparseserve.devices import dtype_name, pruning_dtype
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.layerwise.layer import PrunedLayer, prune_layer
from sparseserve.layerwise.plan import UNSEEN, check_plan, dense_reasons, ignored_modules
from sparseserve.layerwise.preparation import Preparation, preparations
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.reconstruction import OutputError, PredictionError, RelativeError
from sparseserve.layerwise.streams import HiddenStreams
from sparseserve.machine import give_back_freed_memory
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, entering_states
from sparseserve.models.prediction import prediction_head
from sparseserve.models.reading import reading_weights
from sparseserve.models.structure import ModelStructure, trace_structure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import Environment, LayerReport, PruneReport
from sparseserve.text.calibration import CalibrationSet


class LayerStore(Protocol):
    """Where finished layers are kept, so that a killed run can go on."""

    def load(self, layer: str) -> PrunedLayer | None:
        """Return a finished layer, or None."""
        ...

    def save(self, layer: str, pruned: PrunedLayer) -> None:
        """Keep a finished layer, whole or not at all."""
        ...

    def fresh(self, name: str) -> Path:
        """Return the path of a folder, not there yet, for what need not outlive the run."""
        ...


def prune_model(
    model: nn.Module,
    recipe: PruneRecipe,
    calibration: CalibrationSet,
    *,
    store: LayerStore,
    progress: PruneProgress,
    device: torch.device,
    engine: Engine | None = None,
    structure: ModelStructure | None = None,
) -> PruneReport:
    """Prune ``model`` in place.

    Args:
        model: A causal language model on the CPU.
        recipe: What to do.
        calibration: Token windows of equal length.
        store: Keeps finished layers, and the hidden states between layers.
        progress: Told of every step.
        device: Where layers run and are pruned; one layer at a time is copied there.
        engine: Who prunes the layers; None is this process, one after the other.
        structure: Its layers, if they are known; the whole model is run to find them.

    Raises:
        UnsupportedModelError: The structure of the model cannot be found.
        RecipeError: An operator does not fit the pattern.
        NumericalError: Activations, weights or statistics are not finite; names the operator.
    """
    started = time.perf_counter()
    autocast_to = recipe.autocast_to(device)
    with unstacked_experts(model):
        # A few tokens show the structure; more would only cost logits.
        structure = structure or trace_structure(model, calibration.windows[0][:8])
        check_plan(structure, recipe)
        calls = capture_layer_calls(model, structure, calibration.windows, autocast_to=autocast_to)
        windows = (*calibration.scrambled, *calibration.windows)
        streams = HiddenStreams.start(
            store.fresh("hidden"),
            entering_states(model, structure, windows),
            dense=recipe.compares_with_dense,
            chained=recipe.correction.chained,
            # A GPU runs a layer again sooner than a disk gives its inputs back; a CPU does not.
            keep_inputs=recipe.correction.needs_dense and device.type == "cpu",
            scrambled=len(calibration.scrambled),
        )
        streams = streams.recording(model, structure, calls, windows)
        errors = None
        if recipe.reconstruction.epochs:
            errors = OutputErrors.of(model, structure, calibration.windows[0], device)
        work = LayerWork(
            model=model,
            structure=structure,
            recipe=recipe,
            calls=calls,
            streams=streams,
            scrambled_layers=calibration.scrambled_layers,
            errors=errors,
            preparations=preparations(model, structure, recipe, calibration.windows[0], progress),
            store=store,
            progress=progress,
            device=device,
        )
        done = (engine or LocalEngine()).prune_layers(work)
        reasons = dense_reasons(structure)
        reasons |= {name: UNSEEN for report in done.reports for name in report.unseen}
        return PruneReport(
            layers=done.reports,
            dense_modules=(*ignored_modules(structure, recipe), *reasons),
            dense_reasons=reasons,
            seconds=done.earlier_seconds + time.perf_counter() - started,
            peak_memory_bytes=_peak_memory(device),
            environment=Environment.here(),
            compute_dtype=dtype_name(
                autocast_to or pruning_dtype(next(model.parameters()).dtype, device)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """The decoder layers of a model, about to be pruned, and all that it takes.

    Attributes:
        model: Dense, on the CPU, its experts unstacked; pruned in place.
        structure: Its layers.
        recipe: What to do.
        calls: How the model calls each layer.
        streams: What enters the first layer.
        scrambled_layers: How many layers, from the first on, see the scrambled windows.
        errors: What training each layer should lower; None for no training.
        preparations: What is done to each layer first.
        store: Keeps finished layers.
        progress: Told of every step.
        device: Where layers run and are pruned.
    """

    model: nn.Module
    structure: ModelStructure
    recipe: PruneRecipe
    calls: Sequence[LayerCall]
    streams: HiddenStreams
    scrambled_layers: int
    errors: OutputErrors | None
    preparations: Sequence[Preparation]
    store: LayerStore
    progress: PruneProgress
    device: torch.device


@dataclass(frozen=True, slots=True)
class FinishedLayers:
    """What an engine did: the reports, first layer to last.

    ``earlier_seconds`` is the wall time of the layers that an interrupted run had finished.
    """

    reports: tuple[LayerReport, ...]
    earlier_seconds: float


class Engine(Protocol):
    """Who prunes the decoder layers, and where. The weights depend on it in no bit."""

    def check(self, recipe: PruneRecipe, device: torch.device) -> None:
        """Refuse what cannot be done this way, before any work.

        Raises:
            SparseServeError: Says what, and the remedy.
        """
        ...

    def prune_layers(self, work: LayerWork) -> FinishedLayers:
        """Prune the layers of ``work.model`` in place, but for those that its store has.

        Raises:
            NumericalError: Names the operator.
            ArtifactError: The disk is full or cannot be written.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """This process prunes the layers, one after the other."""

    def check(self, recipe: PruneRecipe, device: torch.device) -> None:
        """Refuse nothing."""

    def prune_layers(self, work: LayerWork) -> FinishedLayers:
        """Prune each layer, write it to disk, and run it to what the next one sees."""
        streams, store, total = work.streams, work.store, len(work.structure.layers)
        reports = []
        earlier = 0.0
        last = _last_unfinished(work)
        for number, (layer, call) in enumerate(
            zip(work.structure.layers, work.calls, strict=True), start=1
        ):
            work.progress.layer_started(layer.name, number, total)
            module = work.model.get_submodule(layer.name)
            pruned = store.load(layer.name)
            earlier += pruned.report.seconds if pruned else 0.0
            if pruned and number > last:
                pruned.write_to(module)
                reports.append(pruned.report)
                work.progress.layer_finished(pruned.report)
                continue
            if number > work.scrambled_layers:
                streams = streams.without_scrambled()
            context = streams.enter(module, layer, call, work.device)
            if pruned is None:
                error = work.errors.of_layer(number) if work.errors else None
                first = work.preparations[number - 1]
                pruned = prune_layer(context, work.recipe, work.progress, error, first)
                store.save(layer.name, pruned)
                # What is read from a file is mapped: memory does not grow with the layers.
                pruned = store.load(layer.name) or pruned
            pruned.write_to(module)
            streams = streams.leave(context, module)
            reports.append(pruned.report)
            give_back_freed_memory()
            work.progress.layer_finished(pruned.report)
        return FinishedLayers(tuple(reports), earlier)


def _last_unfinished(work: LayerWork) -> int:
    """Return the number of the last layer, from 1, that is not stored: none after it need run."""
    layers = work.structure.layers
    numbers = range(len(layers), 0, -1)
    return next((n for n in numbers if work.store.load(layers[n - 1].name) is None), 0)


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """What training each layer should lower; ``reading`` weighs the features of its output."""

    model: nn.Module
    structure: ModelStructure
    window: Tensor
    device: torch.device
    reading: tuple[Tensor | None, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        structure: ModelStructure,
        window: Tensor,
        device: torch.device,
    ) -> OutputErrors:
        """Look at ``model`` while it is dense."""
        # Gains are those of norms, which hardly depend on the text; the whole model runs for them.
        reading = reading_weights(model, structure, window[:512])
        return cls(model, structure, window, device, reading)

    def of_layer(self, number: int) -> OutputError:
        """Return the error of a layer, numbered from 1; only predictions follow the last one."""
        if number == len(self.structure.layers):
            head = prediction_head(self.model, self.structure, self.window[:8], self.device)
            if head is not None:
                return PredictionError(head)
        weights = self.reading[number - 1]
        return RelativeError(None if weights is None else weights.to(self.device))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
