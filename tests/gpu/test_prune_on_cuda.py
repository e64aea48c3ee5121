"""Pruning on a CUDA device gives what the CPU gives, up to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparseserve.pruners import PRUNERS
from sparseserve.recipe.toml import PRESETS, UNTRAINED
from sparseserve.report import PruneReport
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", PRUNERS)
def test_errors_on_cuda_are_those_on_the_cpu(tmp_path: Path, method: str) -> None:
    source = str(save_tiny_model("llama", tmp_path / "model"))
    spec = CalibrationSpec(samples=4, sequence_length=64, scrambled=0)
    recipe = replace(UNTRAINED, pruner=PRUNERS[method](), calibration=spec)
    reports = [
        PruneReport.from_json(
            prune_and_export(
                Job(source, recipe, device=torch.device(kind)), tmp_path / kind
            ).manifest.report
        )
        for kind in ("cpu", "cuda")
    ]
    errors = [report.mean_relative_error for report in reports]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_layers_trained_on_cuda_come_as_close_as_on_the_cpu(tmp_path: Path) -> None:
    source = str(save_tiny_model("llama", tmp_path / "model"))
    recipe = replace(
        PRESETS["default"],
        calibration=CalibrationSpec(samples=16, sequence_length=64, scrambled=1),
    )
    errors = []
    for kind in ("cpu", "cuda"):
        job = Job(source, recipe, device=torch.device(kind))
        artifact = prune_and_export(job, tmp_path / kind)
        layers = PruneReport.from_json(artifact.manifest.report).layers
        trained = [layer.reconstruction for layer in layers if layer.reconstruction]
        assert len(trained) == len(layers)
        errors.append([layer.error_after for layer in trained])
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
