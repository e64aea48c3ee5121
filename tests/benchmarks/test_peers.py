"""Comparing with other tools: what can be checked where they are not installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click import ClickException
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.peers import tables
from benchmarks.peers import worker as peer_worker
from benchmarks.peers.compare import chosen, compare
from benchmarks.peers.environment import (
    INSTALLED,
    PEERS,
    Peer,
    PeerError,
    WorkerReport,
    environment,
    read_windows,
    write_windows,
)
from benchmarks.peers.timing import (
    OURS_TIMED,
    REFERENCE,
    Timing,
    ours_timed,
    time_ours,
    timing_table,
    write_timings,
)
from benchmarks.quality.compare import Setting
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec, load_calibration
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan

SPEC = CalibrationSpec(samples=3, sequence_length=16, seed=5)
SETTING = Setting(
    model="model",
    pattern="2:4",
    calibration=None,
    samples=3,
    sequence_length=16,
    evaluation_windows=2,
    evaluation_length=16,
    texts={"speeches": None},
)
# A distribution that is installed here plays the other tool, so that its version can be read.
STAND_IN = "torch"


def prune_by_magnitude(model: nn.Module, windows: Tensor) -> None:
    for window in windows:
        model(input_ids=window[None])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight.copy_(TWO_FOUR.project(module.weight))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "dense")


@pytest.fixture
def run_worker(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[peer_worker.Prune], WorkerReport]:
    """Run the worker in this process with a function in the place of a tool."""

    def run(prune: peer_worker.Prune) -> WorkerReport:
        monkeypatch.setitem(peer_worker.TOOLS, STAND_IN, lambda folder, method: prune)
        windows, report = tmp_path / "windows.safetensors", tmp_path / "report.json"
        write_windows(str(dense), SPEC, windows)
        arguments = ["--model", dense, "--windows", windows, "--tool", STAND_IN]
        arguments += ["--method", "any", "--report", report, "--checkpoint", tmp_path / "pruned"]
        peer_worker.main(str(argument) for argument in arguments)
        return WorkerReport(**json.loads(report.read_text(encoding="utf-8")))

    return run


def operators(model: Path) -> list[str]:
    return [name for name, _ in plan(Job(str(model))).operators]


def test_the_file_holds_the_windows_that_our_methods_calibrate_on(
    dense: Path, tmp_path: Path
) -> None:
    path = tmp_path / "windows.safetensors"
    recorded = write_windows(str(dense), SPEC, path)
    expected = load_calibration(SPEC, AutoTokenizer.from_pretrained(dense), None)
    assert torch.equal(read_windows(path), torch.stack(expected.windows))
    assert recorded == expected.record.digest == peer_worker.digest(read_windows(path))


@pytest.mark.further
def test_ours_is_timed_on_the_windows_that_the_tools_are_given(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text("The quick brown fox jumps over the lazy dog again. " * 40, encoding="utf-8")
    own = replace(SPEC, source=str(source))
    digest = write_windows(str(dense), own, tmp_path / "windows.safetensors")
    magnitude = ("magnitude", "--method magnitude")
    assert time_ours(str(dense), own, *magnitude, repeat=0, digest=digest).seconds > 0
    with pytest.raises(PeerError, match="other tokens"):
        time_ours(str(dense), replace(own, seed=6), *magnitude, repeat=0, digest=digest)


def test_times_are_medians_and_relative_to_our_sparsegpt(tmp_path: Path) -> None:
    seconds = {
        ("llmcompressor", "sparsegpt"): (50.0, 90.0, 40.0),
        ("sparseserve", "sparsegpt, sequential"): (100.0, 40.0, 30.0),
        ("sparseserve", "default"): (110.0, 120.0, 300.0),
    }
    timings = [
        Timing(tool=tool, method=method, repeat=0, seconds=each, peak_memory_bytes=2**30)
        for (tool, method), times in seconds.items()
        for each in times
    ]
    path = tmp_path / "times.json"
    write_timings(path, "a/model", SPEC, timings)
    table = timing_table(json.loads(path.read_text(encoding="utf-8")))
    assert "| llmcompressor | sparsegpt | 50 | 1.25 | 1.00 |" in table
    assert "| sparseserve | sparsegpt, sequential | 40 | 1.00 | 1.00 |" in table
    assert "| sparseserve | default | 120 | 3.00 | 1.00 |" in table
    assert "medians of 3 runs" in table


def test_a_checkpoint_of_the_worker_is_the_dense_one_but_for_what_was_pruned(
    run_worker: Callable[[peer_worker.Prune], WorkerReport], dense: Path, tmp_path: Path
) -> None:
    report = run_worker(prune_by_magnitude)
    names = operators(dense)
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")
    for name, old in load_file(dense / "model.safetensors").items():
        expected = TWO_FOUR.project(old) if name.removesuffix(".weight") in names else old
        assert torch.equal(pruned.pop(name), expected), name
    assert not pruned
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()
    assert report.tokens == SPEC.samples * 16
    assert report.seconds > 0


def test_kept_weights_that_the_tool_did_not_change_count_as_unchanged(
    run_worker: Callable[[peer_worker.Prune], WorkerReport], dense: Path, tmp_path: Path
) -> None:
    run_worker(prune_by_magnitude)
    difference = compare(tmp_path / "pruned", dense, operators(dense))
    assert difference.zeros == pytest.approx(0.5)
    assert difference.changed == 0


def test_a_changed_weight_is_counted(
    run_worker: Callable[[peer_worker.Prune], WorkerReport], dense: Path, tmp_path: Path
) -> None:
    def prune(model: nn.Module, windows: Tensor) -> None:
        prune_by_magnitude(model, windows)
        model.get_submodule(operators(dense)[0]).weight.mul_(2)  # type: ignore[operator]  # a Tensor

    run_worker(prune)
    one = compare(tmp_path / "pruned", dense, operators(dense)[:1])
    others = compare(tmp_path / "pruned", dense, operators(dense)[1:])
    assert (one.changed, others.changed) == (1, 0)


@pytest.mark.further
def test_a_checkpoint_that_is_not_two_four_is_refused_by_name(
    run_worker: Callable[[peer_worker.Prune], WorkerReport], dense: Path, tmp_path: Path
) -> None:
    culprit = operators(dense)[-1]

    def prune(model: nn.Module, windows: Tensor) -> None:
        prune_by_magnitude(model, windows)
        model.get_submodule(culprit).weight[1, 4:8] = 1.0  # type: ignore[operator]  # a Tensor

    run_worker(prune)
    with pytest.raises(PeerError, match=rf"{culprit} is not 2:4: row 1, columns from 4: 4"):
        compare(tmp_path / "pruned", dense, operators(dense))


def test_a_tool_that_calibrates_on_other_tokens_is_refused(
    run_worker: Callable[[peer_worker.Prune], WorkerReport],
) -> None:
    def prune(model: nn.Module, windows: Tensor) -> None:
        prune_by_magnitude(model, windows.flip(dims=(1,)))

    with pytest.raises(SystemExit, match="other tokens"):
        run_worker(prune)


def test_a_tool_that_prunes_a_tied_output_embedding_is_refused(tmp_path: Path) -> None:
    tied = save_tiny_model("gemma3_text", tmp_path / "tied")
    state = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in state
    embedding = state["model.embed_tokens.weight"]
    with pytest.raises(SystemExit, match="tied"):
        peer_worker.save_like(
            tied, tmp_path / "out", {**state, "lm_head.weight": TWO_FOUR.project(embedding)}
        )
    peer_worker.save_like(tied, tmp_path / "whole", {**state, "lm_head.weight": embedding})


def test_a_checkpoint_keeps_the_dtype_of_the_dense_one(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense", dtype=torch.bfloat16)
    state = load_file(dense / "model.safetensors")
    peer_worker.save_like(dense, tmp_path / "out", {key: w.float() for key, w in state.items()})
    for name, stored in load_file(tmp_path / "out" / "model.safetensors").items():
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, state[name])


def test_an_environment_is_made_anew_only_when_its_requirements_change(tmp_path: Path) -> None:
    peer = PEERS[0]
    folder = tmp_path / peer.tool
    folder.mkdir()
    digest = hashlib.sha256(peer.requirements.read_bytes()).hexdigest()
    (folder / INSTALLED).write_text(digest, encoding="utf-8")
    assert environment(peer, tmp_path) == folder / "bin" / "python"
    assert not (folder / "bin").exists()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.tool)
def test_every_requirement_is_pinned_and_torchvision_is_none_of_them(peer: Peer) -> None:
    for line in _requirements(peer.requirements):
        assert "==" in line
        assert not line.startswith("torchvision")


def _requirements(path: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def test_only_names_a_tool_and_its_method() -> None:
    assert [(peer.tool, method) for peer, method in chosen(("llmcompressor:wanda",))] == [
        ("llmcompressor", "wanda")
    ]
    assert len(chosen(())) == sum(len(peer.methods) for peer in PEERS)
    with pytest.raises(PeerError, match="nvidia-modelopt:wanda"):
        chosen(("nvidia-modelopt:wanda",))


def test_of_ours_the_reference_is_timed_whatever_is_named() -> None:
    assert list(ours_timed(("default",))) == [REFERENCE, "default"]
    assert ours_timed(()) == OURS_TIMED
    with pytest.raises(PeerError, match="--ours-only refti: not one of sparsegpt, sequential;"):
        ours_timed(("refti",))


def test_the_table_takes_our_figures_only_from_the_same_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    ours = {
        "setting": asdict(SETTING),
        "runs": [
            {"variant": f"{method}:none", "perplexity": {"speeches": perplexity}}
            for method, perplexity in (("sparsegpt", 11.0), ("magnitude", 99.0))
        ],
    }
    (tmp_path / "ours.json").write_text(json.dumps(ours), encoding="utf-8")
    result = {
        "setting": asdict(SETTING),
        "machine": {"commit": "abc1234", "date": "today"},
        "ours": "ours.json",
        "runs": [
            {
                "seed": seed,
                "worker": {"tool": "tool", "version": "1.2", "method": "sparsegpt"},
                "perplexity": {"speeches": perplexity},
                "changed_weights": 0.25,
            }
            for seed, perplexity in ((0, 12.0), (1, 14.0))
        ],
    }
    table = tables.peers_table(result).splitlines()
    assert "| tool 1.2 | sparsegpt | 13.00 (12.00 to 14.00) | 25% |" in table
    assert "| sparseserve | sparsegpt, error correction none | 11.00 | |" in table
    assert not any("magnitude" in line for line in table)
    with pytest.raises(ClickException, match="another setting"):
        tables.peers_table({**result, "setting": asdict(replace(SETTING, samples=4))})
