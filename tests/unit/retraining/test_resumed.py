"""Training that was killed goes on where it was saved last, and ends in the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM, PreTrainedModel

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.retraining.losses import dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.retraining.state import StateFolder
from sparseserve.testing import tiny_model
from tests.unit.retraining.pruned_model import QUICK, bits, prune, pruned


class Killed(Exception):
    """Ends training."""


@pytest.mark.parametrize("every_weight", [False, True])
@pytest.mark.parametrize("windows", [2, 4, 5, 7, 10])
def test_training_that_was_killed_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, every_weight: bool, windows: int
) -> None:
    knobs = replace(QUICK, every_weight=every_weight)
    whole, killed = pruned(), pruned()
    expected = whole.retrained(knobs)
    store = StateFolder(tmp_path / "training", every_seconds=0)
    seen: list[int] = []

    def kill(done: int, total: int, loss: float) -> None:
        if done == windows:
            raise Killed

    def see(done: int, total: int, loss: float) -> None:
        seen.append(done)

    arguments = (killed.operators, killed.windows, knobs)
    with pytest.raises(Killed):
        retrain(killed.model, *arguments, dense=killed.dense, store=store, on_window=kill)
    # A window is told of before the state after it is saved.
    begun = pruned()
    found = retrain(begun.model, *arguments, dense=begun.dense, store=store, on_window=see)
    assert seen[0] == windows
    assert found.epochs == expected.epochs
    assert found.after == expected.after
    for name, value in begun.state().items():
        assert bits(value) == bits(whole.state()[name]), name


def test_experts_that_only_some_steps_reached_go_on_where_they_were(tmp_path: Path) -> None:
    knobs = replace(QUICK, every_weight=True, batch=1)

    def run(store: StateFolder | None, killed_at: int = 0) -> dict[str, bytes]:
        def kill(done: int, total: int, loss: float) -> None:
            if done == killed_at:
                raise Killed

        model = many_experts()
        with unstacked_experts(model):
            case = prune(model)
            # Few tokens leave some experts without any.
            windows = [window[:3] for window in case.windows]
            dense = tuple(dense_predictions(model, windows, knobs.likeliest))
            arguments = (case.operators, windows, knobs)
            retrain(model, *arguments, dense=dense, store=store, on_window=kill)
        return {name: bits(value) for name, value in model.state_dict().items()}

    store = StateFolder(tmp_path / "training", every_seconds=0)
    with pytest.raises(Killed):
        run(store, killed_at=5)
    state = store.load()
    assert state is not None
    assert {0, state.steps} < set(state.taken), "no step missed an expert: the test shows nothing"
    assert run(store) == run(None)


def many_experts() -> PreTrainedModel:
    """Return a mixture of so many experts that a short text reaches few."""
    config = tiny_model("mixtral").config
    config.num_local_experts = 16
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval().requires_grad_(False)


def test_a_state_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    store = StateFolder(tmp_path / "training", every_seconds=0)
    case, other = pruned(), pruned()
    retrain(case.model, case.operators, case.windows, QUICK, dense=case.dense, store=store)
    [file] = (tmp_path / "training").glob("*/model.safetensors")
    assert store.load() is not None
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert store.load() is None
    found = retrain(
        other.model, other.operators, other.windows, QUICK, dense=other.dense, store=store
    )
    assert all(bits(value) == bits(other.state()[name]) for name, value in case.state().items())
    assert found.steps == 6


def test_what_a_killed_save_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    store = StateFolder(tmp_path / "training", every_seconds=0)
    left = tmp_path / "training" / "2"
    left.mkdir(parents=True)
    for name in ("model.safetensors", "model.safetensors.tmp"):
        (left / name).write_bytes(b"half of it")
    case = pruned()
    retrain(case.model, case.operators, case.windows, QUICK, dense=case.dense, store=store)
    assert sorted(path.name for path in store.path.iterdir()) == ["6", "state.json"]
    assert store.load() is not None
