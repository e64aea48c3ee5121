"""The ranking of a model's operators by what pruning each costs, as a folder to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sparseserve.budget.price_run import HeldOutSpec, SensitivityRun
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.budget.ranking_plot import require_plotly, write_sensitivity_plot
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.layerwise.layer import PruneProgress, Silence
from sparseserve.recipe.settings import PruneRecipe


def measure_and_report(
    source: str,
    out: Path,
    recipe: PruneRecipe,
    *,
    held_out: HeldOutSpec | None = None,
    device: torch.device | None = None,
    progress: PruneProgress | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[UnitSensitivity, ...]:
    """Measure every unit that ``recipe`` would prune; write ``sensitivity.json`` and ``.html``.

    A run that is killed leaves ``OUT.partial``; the same call goes on.

    Args:
        source: A folder, or a name on the Hugging Face hub.
        out: Must be absent or empty; appears whole at the end.
        recipe: Which operators, pattern and calibration.
        held_out: What to measure on.
        device: Where to run; None is a CUDA device if there is one.
        progress: Told of every layer and operator; None for nobody.
        on_stage: Told what is going on before, between and after.

    Raises:
        MissingExtraError: plotly is not installed.
        SparseServeError: The model cannot be pruned or run, or ``out`` is not empty.
    """
    require_plotly()
    spec = held_out or HeldOutSpec()
    with SensitivityRun.open(source, out, recipe, spec, device, on_stage=on_stage) as run:
        units = run.sensitivities(progress or Silence(), on_stage)
        _publish(run, units)
    return units


def _publish(run: SensitivityRun, units: Sequence[UnitSensitivity]) -> None:
    """Write the list and the plot and move them to the output."""
    folder = run.folder.fresh("report")
    with writing(folder):
        folder.mkdir()
    data = {
        "model": run.source,
        "recipe": run.recipe.to_json(),
        "texts": [text.name for text in run.texts],
        "windows_a_text": len(run.texts[0].sensitivity),
        "sequence_length": run.calibration.record.sequence_length,
        "units": [asdict(unit) for unit in units],
    }
    write_json(folder / "sensitivity.json", data)
    title = (
        f"{Path(run.source).name}, {run.recipe.pattern}: what pruning each group of operators costs"
    )
    write_sensitivity_plot(folder / "sensitivity.html", units, title)
    run.folder.publish(folder)
