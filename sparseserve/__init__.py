"""Prune language models to 2:4 sparsity, export them and serve them.

Names are imported when they are first used, so ``import sparseserve`` is quick.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseserve.artifact import Artifact, verify
    from sparseserve.calibration import CalibrationSpec
    from sparseserve.dial import dial_and_export
    from sparseserve.dial_report import KeepDenseFraction, MaxPerplexityIncrease
    from sparseserve.errors import SparseServeError
    from sparseserve.inspection import inspect_checkpoint
    from sparseserve.measurement import EvaluationSpec, evaluate
    from sparseserve.recipe import PruneRecipe, load_recipe
    from sparseserve.sensitivity_run import HeldOutSpec
    from sparseserve.serving.comparison import compare
    from sparseserve.serving.latency import LatencyPlan
    from sparseserve.serving.server import server_command
    from sparseserve.serving.tuner import tune
    from sparseserve.sparsity import SparsityPattern
    from sparseserve.workflow import export, plan, prune_and_export

__all__ = [
    "Artifact",
    "CalibrationSpec",
    "EvaluationSpec",
    "HeldOutSpec",
    "KeepDenseFraction",
    "LatencyPlan",
    "MaxPerplexityIncrease",
    "PruneRecipe",
    "SparseServeError",
    "SparsityPattern",
    "__version__",
    "compare",
    "dial_and_export",
    "evaluate",
    "export",
    "inspect_checkpoint",
    "load_recipe",
    "plan",
    "prune_and_export",
    "server_command",
    "tune",
    "verify",
]

__version__ = metadata.version("sparseserve")

_HOMES = {
    "Artifact": "artifact",
    "CalibrationSpec": "calibration",
    "EvaluationSpec": "measurement",
    "HeldOutSpec": "sensitivity_run",
    "KeepDenseFraction": "dial_report",
    "LatencyPlan": "serving.latency",
    "MaxPerplexityIncrease": "dial_report",
    "PruneRecipe": "recipe",
    "SparseServeError": "errors",
    "SparsityPattern": "sparsity",
    "compare": "serving.comparison",
    "dial_and_export": "dial",
    "evaluate": "measurement",
    "export": "workflow",
    "inspect_checkpoint": "inspection",
    "load_recipe": "recipe",
    "plan": "workflow",
    "prune_and_export": "workflow",
    "server_command": "serving.server",
    "tune": "serving.tuner",
    "verify": "artifact",
}


def __getattr__(name: str) -> object:
    """Import the module that holds ``name``."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparseserve' has no attribute '{name}'")
    return getattr(import_module(f"sparseserve.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
