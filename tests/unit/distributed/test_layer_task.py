"""A layer that travels as bytes is pruned to the bytes that a run on one machine gives it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sparseserve.distributed.layer_task import LayerTask, layer_task, prune_task
from sparseserve.errors import ClusterError
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import FinishedLayers, LayerWork, LocalEngine, prune_model
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS
from sparseserve.testing import (
    EXPERT_TINY_FAMILIES,
    HANDING_TINY_FAMILIES,
    TINY_FAMILIES,
    tiny_model,
)
from sparseserve.text.calibration import CalibrationRecord, CalibrationSet
from tests.selection import representatives

CPU = torch.device("cpu")
PARALLEL = PRESETS["parallel"]
RECIPES = {
    "parallel": PARALLEL,
    "none, untrained": replace(PRESETS["untrained"], error_correction="none"),
}
FAMILIES = [*TINY_FAMILIES, *HANDING_TINY_FAMILIES, *EXPERT_TINY_FAMILIES]
CASES = [f"{family}: {recipe}" for family in FAMILIES for recipe in RECIPES]


def calibration() -> CalibrationSet:
    draw = torch.Generator().manual_seed(1)
    windows = tuple(torch.randint(250, (4, 24), generator=draw).unbind())
    scrambled = tuple(torch.randint(250, (4, 24), generator=draw).unbind())
    record = CalibrationRecord(
        name="drawn", sources=(), samples=4, sequence_length=24, seed=1, tokens=96, digest=""
    )
    return CalibrationSet(windows, record, scrambled, scrambled_layers=1)


class Travelling:
    """An engine that turns each task into bytes and back; ``tasks`` keeps the bytes."""

    def __init__(self) -> None:
        self.tasks: list[bytes] = []

    def check(self, recipe: PruneRecipe, device: torch.device) -> None:
        pass

    def prune_layers(self, work: LayerWork) -> FinishedLayers:
        streams, found = work.streams, dict[str, PrunedLayer]()
        for number, (layer, call) in enumerate(
            zip(work.structure.layers, work.calls, strict=True), start=1
        ):
            if number > work.scrambled_layers:
                streams = streams.without_scrambled()
            self.tasks.append(pickle.dumps(layer_task(work, number, streams, shared_disk=False)))
            found[layer.name] = prune_task(pickle.loads(self.tasks[-1]))
            work.store.save(layer.name, found[layer.name])
            module = work.model.get_submodule(layer.name)
            context = streams.enter(module, layer, call, work.device)
            streams = replace(streams, dense=context.required_dense.leaving)
        return FinishedLayers(tuple(pruned.report for pruned in found.values()), 0.0)


def pruned(
    folder: Path, family: str, recipe: PruneRecipe, engine: Travelling | LocalEngine
) -> dict[str, PrunedLayer]:
    """Prune a tiny model and return its layers as they were stored."""
    store = LayerFolder(folder / "layers", folder, PruneProgress())
    report = prune_model(
        tiny_model(family),
        recipe,
        calibration(),
        store=store,
        progress=PruneProgress(),
        device=CPU,
        engine=engine,
    )
    layers = {layer.name: store.load(layer.name) for layer in report.layers}
    return {name: layer for name, layer in layers.items() if layer is not None}


def without_times(layer: PrunedLayer) -> object:
    operators = tuple(replace(operator, seconds=0.0) for operator in layer.report.operators)
    return asdict(replace(layer.report, seconds=0.0, operators=operators))


@pytest.mark.parametrize(
    "case", representatives(CASES, {"gemma3n_text: parallel", "gpt_oss: none, untrained"})
)
def test_a_layer_pruned_elsewhere_has_the_bytes_of_one_pruned_here(
    tmp_path: Path, case: str
) -> None:
    family, recipe = case.split(": ")
    here = pruned(tmp_path / "here", family, RECIPES[recipe], LocalEngine())
    there = pruned(tmp_path / "there", family, RECIPES[recipe], Travelling())
    assert here.keys() == there.keys()
    for name, layer in here.items():
        assert without_times(layer) == without_times(there[name])
        assert layer.parameters.keys() == there[name].parameters.keys()
        for parameter, value in layer.parameters.items():
            other = there[name].parameters[parameter]
            assert value.dtype == other.dtype
            assert torch.equal(value, other), (name, parameter)


def test_a_task_takes_one_layer_along_and_not_the_model(tmp_path: Path) -> None:
    engine = Travelling()
    pruned(tmp_path, "gemma2", RECIPES["none, untrained"], engine)
    model = tiny_model("gemma2")
    layer = sum(tensor.nbytes for tensor in model.model.layers[0].parameters())
    hidden = 8 * 24 * 64 * 4
    for task in engine.tasks:
        assert layer < len(task) < layer + hidden + 50_000 < 2 * layer


@pytest.fixture
def task(tmp_path: Path) -> LayerTask:
    engine = Travelling()
    pruned(tmp_path, "llama", RECIPES["none, untrained"], engine)
    found: LayerTask = pickle.loads(engine.tasks[0])
    return found


def test_a_machine_that_computes_otherwise_refuses_a_task(task: LayerTask) -> None:
    other = replace(task.arithmetic, device="cpu, ABACUS")
    with pytest.raises(ClusterError, match=r"node .* computes with cpu, .*with cpu, ABACUS"):
        prune_task(replace(task, arithmetic=other))


def test_a_task_runs_with_the_threads_of_its_sender(task: LayerTask) -> None:
    with threads_kept():
        prune_task(replace(task, arithmetic=replace(task.arithmetic, threads=2)))
        assert torch.get_num_threads() == 2


def test_a_machine_that_does_not_see_the_shared_disk_says_so(
    tmp_path: Path, task: LayerTask
) -> None:
    absent = replace(task.entering.states, path=tmp_path / "absent")
    with pytest.raises(ClusterError, match=r"absent: node .* has no such file: --shared-disk"):
        prune_task(replace(task, entering=replace(task.entering, states=absent, data=None)))


@contextmanager
def threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
