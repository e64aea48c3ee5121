"""The ranking of a model's operators by what pruning each costs, as a folder to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sparseserve.budget.price_run import HeldOutSpec, SensitivityRun
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.budget.ranking_plot import require_plotly, write_sensitivity_plot
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.paths import last_name
from sparseserve.workflow.job import Job


def measure_and_report(
    job: Job, out: Path, *, held_out: HeldOutSpec | None = None
) -> tuple[UnitSensitivity, ...]:
    """Measure every unit that ``job`` would prune; write ``sensitivity.json`` and ``.html``.

    A run that is killed leaves ``OUT.partial``; the same call goes on.

    Args:
        job: The model, and the recipe that says which operators, pattern and calibration.
        out: Must be absent or empty; appears whole at the end.
        held_out: What to measure on.

    Raises:
        MissingExtraError: plotly is not installed.
        SparseServeError: The model cannot be pruned or run, or ``out`` is not empty.
    """
    require_plotly()
    spec = held_out or HeldOutSpec()
    with SensitivityRun.open(job, out, spec) as run:
        units = run.sensitivities()
        _publish(run, units)
    return units


def _publish(run: SensitivityRun, units: Sequence[UnitSensitivity]) -> None:
    """Write the list and the plot and move them to the output."""
    folder = run.folder.fresh("report")
    with writing(folder):
        folder.mkdir()
    data = {
        "model": run.job.source,
        "recipe": run.job.recipe.to_json(),
        "texts": [text.name for text in run.texts],
        "windows_a_text": len(run.texts[0].sensitivity),
        "sequence_length": run.calibration.record.sequence_length,
        "units": [asdict(unit) for unit in units],
    }
    write_json(folder / "sensitivity.json", data)
    name, pattern = last_name(run.job.source), run.job.recipe.pattern
    title = f"{name}, {pattern}: what pruning each group of operators costs"
    write_sensitivity_plot(folder / "sensitivity.html", units, title)
    run.folder.publish(folder)
