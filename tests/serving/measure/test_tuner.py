"""``sparseserve tune``: kernels timed ahead of serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseserve.machine import this_machine
from sparseserve.serving.kernels import BATCHES
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.serving.measure.engine import _worker_environment
from sparseserve.serving.measure.tuner import TunedLayers, TuningReport
from tests.serving.command import sparseserve

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSESERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSESERVE_KERNELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def few_layers(two_four_folder: Callable[..., Path], pack_folder: Callable[[Path], Path]) -> Path:
    """One 2:4 layer of a shape, and two of another: every shape takes seconds to time."""
    return pack_folder(two_four_folder("llama", keep=("o_proj", "down_proj", "layers.1.self_attn")))


def stored(cache: Path) -> dict[str, Any]:
    (path,) = cache.rglob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())["layers"]
    return found


@pytest.mark.further  # the commands of the README tune, too
@pytest.mark.skipif(missing_library() is not None, reason="needs the compiled kernels")
def test_tune_fills_the_cache_and_shows_where_2_4_pays(
    few_layers: Path, cache_folder: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    run = sparseserve("tune", str(few_layers), "--again", "--json", "-o", str(report))
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads(run.stdout)
    assert found == json.loads(report.read_text())
    times = stored(cache_folder)
    assert {layers["layer"] for layers in found["layers"]} == set(times)

    total = dict.fromkeys(map(str, BATCHES), 0.0)
    dense_total = dict(total)
    for layers in found["layers"]:
        by_kernel = {kernel["kernel"]: kernel["seconds"] for kernel in times[layers["layer"]]}
        assert layers["dense_seconds"] == by_kernel["dense"]
        for batch in map(str, BATCHES):
            assert layers["seconds"][batch] == by_kernel[layers["kernels"][batch]][batch]
            total[batch] += len(layers["names"]) * layers["seconds"][batch]
            dense_total[batch] += len(layers["names"]) * layers["dense_seconds"][batch]
    assert found["speedup"] == {
        batch: pytest.approx(dense_total[batch] / seconds) for batch, seconds in total.items()
    }
    assert "model.layers.0.self_attn.qkv_proj" in {n for x in found["layers"] for n in x["names"]}
    assert "together" in run.stderr


def test_a_folder_without_2_4_layers_has_nothing_to_tune(pair: tuple[Path, Path]) -> None:
    _, dense = pair
    result = sparseserve("tune", str(dense))
    assert result.returncode == 1
    assert f"{dense}: no layer is served as 2:4" in result.stderr
    assert "--quantization sparseserve" in result.stderr
    assert "Traceback" not in result.stderr


def test_only_a_worker_that_is_asked_to_times_kernels_again() -> None:
    assert _worker_environment(measure_kernels=True)["SPARSESERVE_MEASURE"] == "1"
    assert "SPARSESERVE_MEASURE" not in _worker_environment(measure_kernels=False)


def test_layers_that_were_not_compared_with_dense_have_no_part_in_the_speedup() -> None:
    def layers(seconds: float, dense: dict[int, float]) -> TunedLayers:
        return TunedLayers(("a", "b"), "8 x 16", "some", {}, {1: "some"}, {1: seconds}, dense)

    report = TuningReport(
        Path(), (layers(1.0, {1: 3.0}), layers(1.0, {})), this_machine(), {}, "today"
    )
    assert report.speedup == {1: 3.0}
    assert replace(report, layers=(layers(1.0, {}),)).speedup == {}
