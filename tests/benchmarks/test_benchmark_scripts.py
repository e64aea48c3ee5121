"""The scripts that are not about one method run, and their tables say what they measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.harness.machine import Machine
from benchmarks.quality import calibration_memory, larger_than_memory, layer_memory, scaling
from benchmarks.quality import compare as quality
from benchmarks.quality.calibration_memory import calibration_memory_table
from benchmarks.quality.larger_than_memory import larger_than_memory_table
from benchmarks.quality.layer_memory import layer_memory_table
from benchmarks.serving import cpu_bf16_kernels, cpu_experts, cpu_int8_kernels, cpu_kernels
from benchmarks.serving.tables import (
    cpu_bf16_kernels_table,
    cpu_experts_table,
    cpu_kernels_table,
)
from sparseserve.testing import save_tiny_model
from tests.benchmarks.script_runs import smoke_run, table_cells
from tests.ray_end import quiet_end


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.further
def test_a_smoke_run_measures_memory_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke_run(calibration_memory, monkeypatch)
    smoke_run(layer_memory, monkeypatch)


@pytest.mark.further
@pytest.mark.timeout(900)
def test_a_smoke_run_measures_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `distributed` is not installed")
    with quiet_end():
        smoke_run(scaling, monkeypatch)


def test_the_table_of_a_cluster_compares_with_one_process() -> None:
    rows = [
        scaling.Row(nodes=nodes, seconds=seconds, layer_seconds=90.0, peak_memory_bytes=0)
        for nodes, seconds in ((0, 100.0), (2, 50.0))
    ]
    setting = {"layers": 2, "hidden_size": 64, "intermediate_size": 128, "samples": 4}
    cells = table_cells(scaling.scaling_table, rows, sequence_length=16, threads=1, **setting)
    assert cells[1:] == [
        ["one process", "100", "1.00x speed", "90"],
        ["2", "50", "2.00x speed", "90"],
    ]


def test_a_smoke_run_times_every_product() -> None:
    run = CliRunner().invoke(cpu_kernels.main, ["--smoke"], catch_exceptions=False)
    single, many = (json.loads(line)["milliseconds"] for line in run.output.splitlines())
    assert set(single) == {*cpu_kernels.OWN, "torch_float32", "torch_bfloat16"}
    assert set(single) - set(many) == {"cpu_direct"}
    lines = cpu_kernels_table(
        {
            "machine": asdict(Machine.here()),
            "setting": {"repeats": 1, "processes": 1},
            "rows": [{"rows": 64, "columns": 64, "batch": 1, "milliseconds": single}],
        }
    ).splitlines()
    assert lines[2].startswith("| 64 x 64 | 1 | `cpu_")


def test_a_smoke_run_times_every_product_of_int8_codes() -> None:
    run = CliRunner().invoke(cpu_int8_kernels.main, ["--smoke"], catch_exceptions=False)
    lines = [line for line in run.output.splitlines() if line.startswith("{")]
    single, many = (json.loads(line) for line in lines)
    assert set(single["milliseconds"]) == set(cpu_int8_kernels.PRODUCTS)
    assert set(single["milliseconds"]) - set(many["milliseconds"]) == {"cpu_direct"}
    # Activations of 8 bits are wrong by up to half a step of 1/127 of the largest.
    assert single["errors"]["cpu_int8"] < 0.02


def test_a_smoke_run_times_every_product_of_bfloat16() -> None:
    run = CliRunner().invoke(cpu_bf16_kernels.main, ["--smoke"], catch_exceptions=False)
    lines = [line for line in run.output.splitlines() if line.startswith("{")]
    single, many = (json.loads(line)["milliseconds"] for line in lines)
    products = {*cpu_bf16_kernels.SPARSE, *cpu_bf16_kernels.DENSE, "vllm_bfloat16"}
    assert products - set(single) <= {"cpu_bf16_tiles"}
    assert set(single) - set(many) == {"cpu_direct"}


def test_the_table_of_bfloat16_compares_the_fastest_sparse_kernel_with_both_dense_ones() -> None:
    times = {"cpu_bf16": 2.0, "cpu_direct": 5.0, "cpu_bf16_dense": 3.0, "vllm_bfloat16": 4.0}
    rows = [
        {"rows": 64, "columns": columns, "batch": batch, "milliseconds": milliseconds}
        for columns, batch, milliseconds in (
            (32, 1, times),
            (32, 8, {**times, "cpu_bf16": 8.0}),
            (64, 1, {**times, "vllm_bfloat16": 8.0}),
            (64, 8, {**times, "vllm_bfloat16": 6.0}),
        )
    ]
    setting = {"repeats": 1, "processes": 1}
    result = {"machine": asdict(Machine.here()), "setting": setting, "rows": rows}
    assert cpu_bf16_kernels_table(result).splitlines()[:6] == [
        "| outputs x inputs | 1 | 8 |",
        "|---|---|---|",
        "| 64 x 32 | 2.00 | 0.80 |",
        "| 64 x 64 | 4.00 | 3.00 |",
        "| median | 3.00 | 1.90 |",
        "| median against our dense kernel | 1.50 | 1.05 |",
    ]


def test_a_smoke_run_times_experts_both_ways_and_finds_them_alike() -> None:
    run = CliRunner().invoke(cpu_experts.main, ["--smoke"], catch_exceptions=False)
    rows = [json.loads(line) for line in run.output.splitlines() if line.startswith("{")]
    assert [row["tokens"] for row in rows] == [1, 32]
    for row in rows:
        assert set(row["milliseconds"]) == {"vllm", "packed"}
        assert 0 < row["difference"] < 0.02
    lines = cpu_experts_table({"machine": asdict(Machine.here()), "rows": rows}).splitlines()
    assert lines[0] == "| experts like those of | experts | inputs | width | 1 | 32 |"
    assert lines[2].startswith("| tiny | 2 of 4 | 64 | 96 | ")


def test_processes_are_combined_by_medians_of_each_product() -> None:
    times = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 4.0}]
    runs = [cpu_kernels.Row(64, 64, 1, 2, each) for each in times]
    assert cpu_kernels.median_row(runs) == cpu_kernels.Row(64, 64, 1, 2, {"a": 2.0, "b": 4.0})


def test_the_table_of_memory_by_layers_has_a_line_for_each_run() -> None:
    rows = [
        layer_memory.Row(
            recipe="fast",
            layers=count,
            model_bytes=count * 2**20,
            estimate=3 * 2**20,
            peak_memory_bytes=2**21,
            seconds=1.0,
        )
        for count in (8, 16)
    ]
    setting = {"hidden_size": 64, "intermediate_size": 128, "samples": 8, "sequence_length": 16}
    head, *lines = table_cells(layer_memory_table, rows, **setting)
    assert head[1] == "decoder layers"
    assert lines == [
        ["`fast`", "8", "8 MiB", "2 MiB", "3 MiB"],
        ["`fast`", "16", "16 MiB", "2 MiB", "3 MiB"],
    ]


def test_the_table_of_memory_has_a_line_for_each_recipe() -> None:
    rows = [
        calibration_memory.Row(recipe=recipe, windows=count, peak_memory_bytes=count * 2**20)
        for recipe in calibration_memory.RECIPES
        for count in (8, 1024)
    ]
    head, *lines = table_cells(
        calibration_memory_table, rows, model="a/b", model_bytes=0, sequence_length=16, layers=1
    )
    assert head == ["peak memory, MiB", "8 windows", "1024 windows"]
    assert lines == [["`default`", "8", "1,024"], ["`fast`", "8", "1,024"]]


def test_a_model_pruned_before_the_kill_is_not_pruned_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = quality.Setting(
        model=str(tiny),
        pattern="2:4",
        calibration=None,
        samples=2,
        sequence_length=16,
        evaluation_windows=1,
        evaluation_length=16,
        texts={"speeches": None},
    )

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quality, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            quality.measure(setting, "magnitude:none", 0, tmp_path)
    monkeypatch.setattr(quality, "prune_and_export", killed)
    run = quality.measure(setting, "magnitude:none", 0, tmp_path)
    assert run.perplexity["speeches"] > 1
    assert not list(tmp_path.iterdir())


def test_the_table_of_a_model_larger_than_memory_gives_sizes_and_minutes() -> None:
    row = larger_than_memory.Row(
        recipe="wanda",
        layers=100,
        model_bytes=12 * 2**30,
        limit_bytes=4 * 2**30,
        estimate=3 * 2**30,
        peak_memory_bytes=2 * 2**30,
        seconds=600.0,
    )
    cells = table_cells(larger_than_memory_table, [row])
    sizes = ["12.00 GiB", "4.00 GiB", "2.00 GiB", "3.00 GiB"]
    assert cells[1] == ["`wanda`", "100", *sizes, "10"]
