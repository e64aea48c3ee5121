"""What a run takes follows from one layer in memory, and from the whole model on the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.loading import LoadedModel
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.settings import ROTATIONS, PruneRecipe
from sparseserve.recipe.toml import PRESETS, UNTRAINED
from sparseserve.retraining.settings import Retraining
from sparseserve.solvers.statistics import StatisticsSum, moment_bytes
from sparseserve.testing import TINY_FAMILIES, tiny_model, tiny_tokenizer
from sparseserve.text.calibration import CalibrationSet, CalibrationSpec, load_calibration
from sparseserve.workflow.job import Job
from sparseserve.workflow.needs import Needs, needs_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    spec = CalibrationSpec(samples=4, sequence_length=32, scrambled=0)
    return load_calibration(spec, tiny_tokenizer(), None, 264)


def needs(
    recipe: PruneRecipe, calibration: CalibrationSet, family: str = "llama", **sizes: Any
) -> Needs:
    if sizes:
        config = LlamaConfig(**{**TINY_FAMILIES["llama"], **sizes})
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    else:
        model = tiny_model(family)
    with unstacked_experts(model):
        structure = trace_structure(model, torch.arange(8))
    loaded = LoadedModel(model, tiny_tokenizer(), family, Path())
    return needs_of(Job(family, recipe, device=CPU), loaded, structure, calibration)


def test_memory_does_not_grow_with_the_layers_and_disk_does(calibration: CalibrationSet) -> None:
    few, many = (needs(UNTRAINED, calibration, num_hidden_layers=count) for count in (2, 16))
    assert few.memory_bytes == many.memory_bytes
    assert few.disk_bytes < many.disk_bytes


def test_memory_grows_with_the_widest_operator(calibration: CalibrationSet) -> None:
    narrow, wide = (needs(UNTRAINED, calibration, intermediate_size=size) for size in (128, 1024))
    # Three moments, twice, and those of the solver.
    assert wide.memory_bytes - narrow.memory_bytes > (1024**2 - 128**2) * (6 * 8 + 6 * 4)


def test_pairs_of_inputs_and_training_take_more(calibration: CalibrationSet) -> None:
    alone = needs(replace(UNTRAINED, error_correction="none"), calibration)
    paired = needs(UNTRAINED, calibration)
    trained = needs(PRESETS["default"], calibration)
    assert alone.memory_bytes < paired.memory_bytes < trained.memory_bytes


def test_rotated_heads_take_the_layer_once_more(calibration: CalibrationSet) -> None:
    plain, rotated = (needs(replace(UNTRAINED, rotate=how), calibration) for how in ROTATIONS)
    layer = sum(value.numel() for value in tiny_model("llama").model.layers[0].parameters())
    assert rotated.memory_bytes - plain.memory_bytes == 4 * layer


def test_distillation_takes_weight_gradient_and_moments_of_all_operators(
    calibration: CalibrationSet,
) -> None:
    few, many = (
        needs(
            replace(UNTRAINED, retraining=Retraining().distilling(8)),
            calibration,
            num_hidden_layers=count,
        )
        for count in (16, 32)
    )
    layers = tiny_model("llama").model.layers
    matrices = sum(value.numel() for value in layers[0].parameters() if value.ndim == 2)
    assert many.memory_bytes - few.memory_bytes > 16 * (4 + 4 + 5 * 4) * matrices


def test_the_statistics_of_all_experts_count_as_far_as_one_pass_holds_them(
    calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = needs(UNTRAINED, calibration, family="mixtral")
    monkeypatch.setattr("sparseserve.workflow.needs.BLOCK_BYTES", 2**16)
    block = needs(UNTRAINED, calibration, family="mixtral")
    # The down projections of four experts, and gate with up, count as eight groups of 128 inputs.
    assert whole.memory_bytes - block.memory_bytes == 8 * 3 * 8 * 128**2 - 2**16


@pytest.mark.parametrize("width", [64, 8192, 8196])
def test_a_moment_is_as_large_as_it_is_said_to_be(width: int) -> None:
    total = StatisticsSum(width, corrected=False, device=torch.device("meta"))
    assert total.finish().gram.nbytes == moment_bytes(width)
