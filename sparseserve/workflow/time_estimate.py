"""How long pruning a model will take, from its first decoder layer.

The layer is pruned as the run would prune it, and nothing of it is kept. The others are taken to
cost as much for each of their weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import FinishedLayers, LayerWork, LocalEngine, prune_model
from sparseserve.layerwise.plan import planned_operators
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.models.structure import LayerStructure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import LayerReport
from sparseserve.workflow.opening import Opening


def estimated_seconds(opening: Opening) -> float:
    """Prune the first layer that holds planned operators, and return what all layers would take.

    Windows of scrambled tokens are left out here, and counted as costing as much as the others.
    Training or rounding of the whole model afterwards is not counted.

    Args:
        opening: The run; its model must not be pruned afterwards, for a layer of it is.

    Raises:
        NumericalError: Names the operator.
        ArtifactError: The disk of temporary files is full.
    """
    job, calibration = opening.job, opening.calibration
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory(prefix="sparseserve-") as scratch:
        folder = Path(scratch)
        report = prune_model(
            opening.loaded.model,
            job.recipe,
            replace(calibration, scrambled=(), scrambled_layers=0),
            store=LayerFolder(folder / "layers", folder, watch),
            progress=watch,
            device=job.runs_on,
            engine=_FirstLayer(),
            structure=opening.structure,
        )
    weights = [_planned_weights(layer, job.recipe) for layer in opening.structure.layers]
    copies = len(calibration.scrambled) / len(calibration.windows)
    shares = layer_shares(weights, [copies] * calibration.scrambled_layers)
    return report.seconds - watch.seconds + watch.seconds * shares


def layer_shares(weights: Sequence[int], more: Sequence[float]) -> float:
    """Return what all layers cost, in units of the first that has weights to prune.

    Args:
        weights: How many weights each layer has to prune; not all 0.
        more: For the first layers, the cost of their additional windows, in units of the others'.
    """
    first = next(count for count in weights if count)
    added = sum(count * share for count, share in zip(weights, more, strict=False))
    return (sum(weights) + added) / first


@dataclass(frozen=True, slots=True)
class _FirstLayer(LocalEngine):
    """Prunes one layer: the first that holds planned operators, given what enters the model."""

    def prune_layers(self, work: LayerWork) -> FinishedLayers:
        layers = work.structure.layers
        first = next(
            number for number, layer in enumerate(layers) if planned_operators(layer, work.recipe)
        )
        chosen = slice(first, first + 1)
        alone = replace(
            work,
            structure=replace(work.structure, layers=layers[chosen]),
            calls=work.calls[chosen],
            preparations=work.preparations[chosen],
        )
        return LocalEngine.prune_layers(self, alone)


@dataclass(slots=True)
class _Stopwatch(PruneProgress):
    """Measures from the start of a layer to its end."""

    seconds: float = 0.0
    _started: float = field(default=0.0, init=False)

    def layer_started(self, name: str, number: int, total: int) -> None:
        self._started = time.perf_counter()

    def layer_finished(self, report: LayerReport) -> None:
        self.seconds = time.perf_counter() - self._started


def _planned_weights(layer: LayerStructure, recipe: PruneRecipe) -> int:
    return sum(item.out_features * item.in_features for item in planned_operators(layer, recipe))
