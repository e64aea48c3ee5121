"""What runs on the first machine with a GPU is in order on one without."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks.gpu import kernel_sweep, outcomes, random_model
from benchmarks.gpu.shapes import MODELS
from sparseserve.serving.kernels import KERNELS, LinearSpec
from sparseserve.serving.kernels.dense import DenseKernel
from sparseserve.serving.measure.latency import Spread

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the kernels of the GPU")
def test_a_smoke_run_measures_every_kernel_of_this_machine(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    arguments = ["--smoke", "--output", str(output)]
    run = CliRunner().invoke(kernel_sweep.main, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    found = json.loads(output.read_text())
    for name, layer in found["layers"].items():
        measured = {
            one["kernel"]
            for one in found["measurements"]
            if f"{one['model']} {one['linear']}" == name
        }
        assert measured == set(layer["errors_in_ulp"])
        assert measured | {refused.split(" at ")[0] for refused in layer["refusals"]} == set(
            KERNELS
        )
        assert all(error < 2 for error in layer["errors_in_ulp"].values())
    assert all(one["lower"] <= one["seconds"] <= one["upper"] for one in found["measurements"])
    assert found["machine"]["commit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_sweep_refuses_a_machine_without_a_gpu() -> None:
    run = CliRunner().invoke(kernel_sweep.main, [])
    assert run.exit_code != 0
    assert "--smoke" in run.output


def test_an_unknown_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = CliRunner().invoke(kernel_sweep.main, ["--models", "GPT-9"])
    assert run.exit_code != 0
    assert "GPT-9: known are SmolLM2-135M" in run.output


def test_a_kernel_that_fails_on_long_prompts_alone_does_not_end_the_sweep() -> None:
    class Short(DenseKernel):
        def matmul(
            self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
        ) -> Tensor:
            if len(inputs) > 16:
                raise RuntimeError("no such algorithm\nfor this shape")
            return DenseKernel().matmul(packed, inputs, bias, rows)

    spec = LinearSpec(32, 64, torch.bfloat16, torch.device("cpu"), two_four=True)
    found = kernel_sweep.layer_result(
        {"dense": KERNELS["dense"], "short": Short()},
        spec,
        model="m",
        linear="l",
        batches=(1, 32),
        repeats=1,
    )
    assert found.refusals == {"short at batch 32": "no such algorithm"}
    assert [(one.kernel, one.batch) for one in found.measurements] == [
        ("dense", 1),
        ("short", 1),
        ("dense", 32),
    ]


def test_nothing_is_measured_without_the_dense_product() -> None:
    class Broken(DenseKernel):
        def matmul(
            self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
        ) -> Tensor:
            if len(inputs) > 16:
                raise RuntimeError("no memory")
            return DenseKernel().matmul(packed, inputs, bias, rows)

    spec = LinearSpec(32, 64, torch.bfloat16, torch.device("cpu"), two_four=True)
    with pytest.raises(RuntimeError, match="no memory"):
        kernel_sweep.layer_result(
            {"dense": Broken()}, spec, model="m", linear="l", batches=(32,), repeats=1
        )


def test_shapes_are_those_of_the_models() -> None:
    llama = MODELS["Llama-3-8B"].linears()
    assert llama["qkv"] == (6144, 4096)
    assert llama["gate_up"] == (28672, 4096)
    weights = 32 * sum(rows * columns for rows, columns in llama.values())
    assert weights == 6_979_321_856  # of 8.03 billion; the rest is embeddings and norms


def test_the_spread_of_one_run_is_itself() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_outcomes_of_the_gpu_tests_are_counted(tmp_path: Path) -> None:
    report, output = tmp_path / "tests.xml", tmp_path / "tests.json"
    report.write_text(
        '<testsuites><testsuite name="pytest">'
        '<testcase name="test_a[1]"/><testcase name="test_a[2]"><failure message="x"/></testcase>'
        '<testcase name="test_b"><skipped message="needs 8.0"/></testcase>'
        "</testsuite></testsuites>"
    )
    arguments = [str(report), "--output", str(output)]
    assert CliRunner().invoke(outcomes.main, arguments).exit_code == 0
    found = json.loads(output.read_text())
    assert found["outcomes"] == {"test_a": {"passed": 1, "failure": 1}, "test_b": {"skipped": 1}}
    assert found["skipped"] == {"needs 8.0": 1}


def test_a_random_model_can_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert CliRunner().invoke(random_model.main, ["tiny", str(folder)]).exit_code == 0
    assert (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()


def test_the_script_runs_modules_that_there_are() -> None:
    text = SCRIPT.read_text()
    modules = set(re.findall(r"-m (benchmarks\.[\w.]+)", text))
    assert len(modules) == 3
    for module in modules:
        assert (SCRIPT.parents[2] / (module.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("argument", ["--help", "model"])
def test_the_script_explains_itself(argument: str) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), argument], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "--smoke" in run.stderr
