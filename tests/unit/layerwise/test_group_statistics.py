"""Each error correction sees the inputs that its definition names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparseserve.layerwise.group_statistics import GroupStatistics
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states, layer_inputs
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.correction import CORRECTIONS, ErrorCorrection
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.testing import tiny_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SecondLayer:
    """The second layer of a model whose first one was changed, and a changed copy of itself."""

    context: LayerContext
    changed: nn.Module
    dense_inputs: list[Tensor]
    pruned_hidden: list[Tensor]


def weakened(layer: nn.Module) -> nn.Module:
    changed = copy_layer(layer)
    for parameter in changed.parameters():
        if parameter.ndim == 2:
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[1]))
    return changed


def second_run(
    folder: Path, correction: str, *, keep: bool = False, dense: bool = True
) -> LayerContext:
    """Return the second layer about to be pruned, the first being weakened."""
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    windows = [torch.randint(0, 256, (12,), generator=generator) for _ in range(3)]
    structure = trace_structure(model, windows[0])
    calls = capture_layer_calls(model, structure, windows)
    entering = list(entering_states(model, structure, windows))
    streams = HiddenStreams.start(
        folder, entering, dense=dense, chained=CORRECTIONS[correction].chained, keep_inputs=keep
    )
    first, second = (model.get_submodule(layer.name) for layer in structure.layers)
    run = streams.enter(first, structure.layers[0], calls[0], CPU)
    streams = streams.leave(run, weakened(first))
    return streams.enter(second, structure.layers[1], calls[1], CPU)


def second_layer(folder: Path, correction: str, *, keep: bool = False) -> SecondLayer:
    run = second_run(folder, correction, keep=keep)
    groups = run.layer.groups
    found = [layer_inputs(run.module, h, run.call, groups)[0] for h in run.required_dense.entering]
    dense_inputs = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return SecondLayer(run, weakened(run.module), dense_inputs, list(run.entering))


def pruned_inputs(layer: SecondLayer, module: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
    groups = layer.context.layer.groups
    found = [layer_inputs(module, window, layer.context.call, groups)[0] for window in hidden]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def assert_moments(found: InputStatistics, pruned: Tensor, dense: Tensor) -> None:
    x, x0 = pruned.double(), dense.double()
    torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.cross, x0.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.dense_gram, x0.T @ x0, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("correction", ["none", "intra", "intra+inter", "sequential"])
def test_a_correction_compares_the_inputs_it_names(
    tmp_path: Path, correction: str, keep: bool
) -> None:
    layer = second_layer(tmp_path / "streams", correction, keep=keep)
    dense_hidden = list(layer.context.required_dense.entering)
    pruned, dense = {
        "none": (layer.dense_inputs, layer.dense_inputs),
        "intra": (pruned_inputs(layer, layer.changed, dense_hidden), layer.dense_inputs),
        "intra+inter": (
            pruned_inputs(layer, layer.changed, layer.pruned_hidden),
            layer.dense_inputs,
        ),
        "sequential": (pruned_inputs(layer, layer.context.module, layer.pruned_hidden),) * 2,
    }[correction]
    groups = layer.context.layer.groups
    statistics = GroupStatistics(
        layer.context, layer.changed, groups, ErrorCorrection.named(correction, 1.0)
    )
    for group, x, x0 in zip(groups, pruned, dense, strict=True):
        assert_moments(statistics.of(group), x, x0)
    differ = not torch.equal(layer.pruned_hidden[0], dense_hidden[0])
    assert differ == CORRECTIONS[correction].chained


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixed_target_is_that_of_mixed_inputs(tmp_path: Path, weight: float) -> None:
    layer = second_layer(tmp_path / "streams", "intra+inter")
    groups = layer.context.layer.groups
    mixed = ErrorCorrection.named("intra+inter", weight)
    statistics = GroupStatistics(layer.context, layer.changed, groups, mixed)
    pruned = pruned_inputs(layer, layer.changed, layer.pruned_hidden)
    for group, x, x0 in zip(groups, pruned, layer.dense_inputs, strict=True):
        assert_moments(statistics.of(group), x, weight * x0 + (1 - weight) * x)


def test_new_weights_of_a_group_are_seen_by_the_next(tmp_path: Path) -> None:
    layer = second_layer(tmp_path / "streams", "intra")
    pruned = copy_layer(layer.context.module)
    groups = layer.context.layer.groups
    statistics = GroupStatistics(layer.context, pruned, groups, CORRECTIONS["intra"])
    assert not statistics.of(groups[0]).corrected  # nothing was pruned before the first group
    pruned.load_state_dict(layer.changed.state_dict())
    later = statistics.of(groups[1])
    drift = later.gram - later.cross - later.cross.T + later.dense_gram
    assert float(drift.diagonal().sum()) > 0.01 * float(later.gram.diagonal().sum())


def test_statistics_of_all_groups_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    layer = second_layer(tmp_path / "streams", "none")
    groups = layer.context.layer.groups
    statistics = GroupStatistics(layer.context, layer.changed, groups, CORRECTIONS["none"])
    for group, x in reversed(list(zip(groups, layer.dense_inputs, strict=True))):
        assert_moments(statistics.of(group), x, x)


def test_sequential_statistics_need_no_dense_stream(tmp_path: Path) -> None:
    runs = [second_run(tmp_path / str(dense), "sequential", dense=dense) for dense in (True, False)]
    groups = runs[0].layer.groups
    with_dense, without = (
        GroupStatistics(run, run.module, groups, CORRECTIONS["sequential"]) for run in runs
    )
    for group in groups:
        assert torch.equal(with_dense.of(group).gram, without.of(group).gram)
    assert runs[1].dense is None
    assert {path.name for path in (tmp_path / "False").iterdir()} == {"pruned-model.layers.0"}


def test_the_files_of_a_layer_are_gone_when_it_is_left(tmp_path: Path) -> None:
    layer = second_layer(tmp_path / "streams", "intra+inter", keep=True)
    left = {path.name for path in (tmp_path / "streams").iterdir()}
    inputs = {states.path.name for states in layer.context.required_dense.inputs}
    assert len(inputs) == len(layer.context.layer.groups)
    assert left == inputs | {
        "dense-model.layers.0",
        "dense-model.layers.1",
        "pruned-model.layers.0",
    }
    assert layer.context.required_dense.entering.path.name == "dense-model.layers.0"
