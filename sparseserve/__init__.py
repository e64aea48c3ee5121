"""Prune language models to 2:4 sparsity, export them and serve them.

Names are imported when they are first used, so ``import sparseserve`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sparseserve.huggingface.autoload import register as _register_with_transformers

if TYPE_CHECKING:
    from sparseserve.budget.price_run import HeldOutSpec
    from sparseserve.budget.report import KeepDenseFraction, MaxPerplexityIncrease
    from sparseserve.budget.within_budget import prune_within_budget
    from sparseserve.checkpoint.artifact import Artifact
    from sparseserve.checkpoint.verification import verify
    from sparseserve.distributed.ray_engine import RayEngine
    from sparseserve.errors import SparseServeError
    from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
    from sparseserve.exporters.tensorrt.settings import TensorRTSettings
    from sparseserve.huggingface.semi_structured import load_semi_structured
    from sparseserve.recipe.settings import PruneRecipe
    from sparseserve.recipe.toml import load_recipe
    from sparseserve.serving.launch.command import server_command
    from sparseserve.serving.measure.comparison import compare
    from sparseserve.serving.measure.latency import LatencyPlan
    from sparseserve.serving.measure.tuner import tune
    from sparseserve.sparsity import SparsityPattern
    from sparseserve.text.calibration import CalibrationSpec
    from sparseserve.workflow.convert import convert
    from sparseserve.workflow.inspection import inspect_checkpoint
    from sparseserve.workflow.job import Job
    from sparseserve.workflow.run import export, plan, prune_and_export

__all__ = [
    "Artifact",
    "CalibrationSpec",
    "EvaluationSpec",
    "HeldOutSpec",
    "Job",
    "KeepDenseFraction",
    "LatencyPlan",
    "MaxPerplexityIncrease",
    "PruneRecipe",
    "RayEngine",
    "SparseServeError",
    "SparsityPattern",
    "TensorRTSettings",
    "__version__",
    "compare",
    "convert",
    "evaluate",
    "export",
    "inspect_checkpoint",
    "load_recipe",
    "load_semi_structured",
    "plan",
    "prune_and_export",
    "prune_within_budget",
    "server_command",
    "tune",
    "verify",
]

_HOMES = {
    "Artifact": "checkpoint.artifact",
    "CalibrationSpec": "text.calibration",
    "EvaluationSpec": "evaluation.evaluate",
    "HeldOutSpec": "budget.price_run",
    "Job": "workflow.job",
    "KeepDenseFraction": "budget.report",
    "LatencyPlan": "serving.measure.latency",
    "MaxPerplexityIncrease": "budget.report",
    "PruneRecipe": "recipe.settings",
    "RayEngine": "distributed.ray_engine",
    "SparseServeError": "errors",
    "SparsityPattern": "sparsity",
    "TensorRTSettings": "exporters.tensorrt.settings",
    "compare": "serving.measure.comparison",
    "convert": "workflow.convert",
    "prune_within_budget": "budget.within_budget",
    "evaluate": "evaluation.evaluate",
    "export": "workflow.run",
    "inspect_checkpoint": "workflow.inspection",
    "load_recipe": "recipe.toml",
    "load_semi_structured": "huggingface.semi_structured",
    "plan": "workflow.run",
    "prune_and_export": "workflow.run",
    "server_command": "serving.launch.command",
    "tune": "serving.measure.tuner",
    "verify": "checkpoint.verification",
}


def __getattr__(name: str) -> object:
    """Import the module that holds ``name``."""
    if name == "__version__":
        # Every program that imports torch imports this package: metadata is read when it is asked.
        return import_module("importlib.metadata").version("sparseserve")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparseserve' has no attribute '{name}'")
    return getattr(import_module(f"sparseserve.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


_register_with_transformers()
