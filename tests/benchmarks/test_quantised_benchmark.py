"""What fewer bits cost: the script on a tiny model, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.quality import quantised
from benchmarks.quality.quantised import FORMS, quantised_table, rounded_inputs
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.toml import UNTRAINED
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export


def test_a_smoke_run_rounds_and_evaluates_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "write_result", None)
    model = save_tiny_model("llama", tmp_path / "model")
    spec = CalibrationSpec(samples=2, sequence_length=32, scrambled=0)
    recipe = replace(UNTRAINED, pruner=Wanda(), calibration=spec)
    prune_and_export(Job(str(model), recipe, "dense"), tmp_path / "pruned")
    arguments = [str(tmp_path / "pruned"), "--result", "none.json", "--smoke", "--windows", "2"]
    run = CliRunner().invoke(
        quantised.main, [*arguments, "--sequence-length", "32"], catch_exceptions=False
    )
    dense, four = (json.loads(line) for line in run.output.splitlines() if line.startswith("{"))
    assert (dense["form"], four["form"]) == ("dense", "2:4 int4")
    assert four["perplexity"]["speeches"] != dense["perplexity"]["speeches"]


def test_bits_count_codes_places_and_scales() -> None:
    bits = {form.name: form.bits_per_weight() for form in FORMS}
    assert bits["dense"] == 16
    assert bits["2:4"] == 9
    assert bits["2:4 int8"] == 5
    assert bits["2:4 int4"] == 3.25
    assert bits["dense int3"] == 3.25


def test_inputs_are_rounded_token_by_token_and_only_inside() -> None:
    linear = nn.Linear(4, 4, bias=False)
    linear.weight.data = torch.eye(4)
    tokens = torch.tensor([[[127.0, 0.4, 0.6, -3.0], [0.0, 0.0, 0.0, 0.0]]])
    with rounded_inputs([linear]):
        assert linear(tokens).tolist() == [[[127, 0, 1, -3], [0, 0, 0, 0]]]
    assert torch.equal(linear(tokens), tokens)


def test_the_table_has_a_line_for_each_form_and_its_gaps() -> None:
    runs = [
        {"form": "dense", "bits_per_weight": 16, "perplexity": {"a": 10.0}},
        {"form": "2:4", "bits_per_weight": 9, "perplexity": {"a": 20.0}},
    ]
    setting = {
        "recipe": {"method": {"name": "admm"}},
        "calibration": {"samples": 16},
        "evaluation_windows": 30,
        "evaluation_length": 512,
    }
    machine = dict.fromkeys(("cpu", "torch", "commit", "date"), "")
    result = {"setting": setting, "machine": machine, "runs": runs}
    *_, last = [line for line in quantised_table(result).splitlines() if line.startswith("|")]
    assert last == "| 2:4 | 9 | 20.00 | 0.693 |"
