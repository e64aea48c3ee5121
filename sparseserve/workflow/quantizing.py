"""Rounding a pruned model in place, layer by layer, its errors repaired on the calibration text.

It comes last: training moves weights off every grid. The layers are gone through once more, as in
pruning, with the pruned weights as the reference and their zeros as the mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparseserve.checkpoint.run_folder import RunFolder
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import prune_model
from sparseserve.pruners.quantize import QuantizeKept
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.report import PruneReport, QuantizationReport
from sparseserve.retraining.settings import Retraining
from sparseserve.workflow.opening import Opening


@dataclass(frozen=True, slots=True)
class Rounded:
    """What rounding did; ``scales`` are ``[out, groups]`` by full names of operators."""

    report: PruneReport
    scales: Mapping[str, Tensor]


def round_weights(opening: Opening, report: PruneReport, run: RunFolder) -> Rounded:
    """Round the pruned weights of the model in place, if the recipe says so.

    Args:
        opening: The run; its model is pruned.
        report: Of pruning.
        run: Keeps finished layers, so that a killed run goes on after them.

    Raises:
        NumericalError: A value or a factorisation is not finite; names the operator.
    """
    job, quantization = opening.job, opening.job.recipe.quantization
    if not quantization:
        return Rounded(report, {})
    job.progress.stage(f"rounding kept weights to {quantization.to}")
    store = LayerFolder(run.path / "rounded", run.path, job.progress)
    found = prune_model(
        opening.loaded.model,
        rounding_recipe(job.recipe, [name for layer in report.layers for name in layer.unseen]),
        replace(opening.calibration, scrambled=(), scrambled_layers=0),
        store=store,
        progress=job.progress,
        device=job.runs_on,
        engine=job.engine,
        structure=opening.structure,
    )
    scales: dict[str, Tensor] = {}
    for layer in found.layers:
        stored = store.load(layer.name)
        assert stored is not None, f"{layer.name}: was stored just now"
        scales |= {f"{layer.name}.{name}": scale for name, scale in stored.scales.items()}
    rounding = QuantizationReport(
        to=quantization.to,
        group_size=quantization.group_size,
        mean_relative_error=found.mean_relative_error,
        seconds=found.seconds,
        scaled=sum(len(layer.scaled) for layer in found.layers),
    )
    seconds = report.seconds + found.seconds
    return Rounded(replace(report, quantization=rounding, seconds=seconds), scales)


def rounding_recipe(recipe: PruneRecipe, unseen: Sequence[str] = ()) -> PruneRecipe:
    """Return the recipe of the second walk over a model that ``recipe`` pruned.

    Args:
        recipe: Says what to round to, and what else stays dense.
        unseen: Full names of operators that stayed dense because no token reached them.
    """
    left = (rf"^(?:{'|'.join(map(re.escape, unseen))})$",) if unseen else ()
    return replace(
        recipe,
        pruner=QuantizeKept(recipe.quantization),
        # Layers that did not depend on one another still do not.
        error_correction="sequential" if recipe.correction.chained else "none",
        reconstruction=Reconstruction(epochs=0),
        retraining=Retraining(epochs=0),
        ignore=(*recipe.ignore, *left),
        rotate="none",
    )
