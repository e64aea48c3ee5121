"""What the experts of a layer read, compared with a plain run of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparseserve.huggingface.experts import (
    ExpertLinears,
    Routing,
    experts_in,
    recorded_routing,
    unstacked_experts,
)
from sparseserve.layerwise import expert_statistics
from sparseserve.layerwise.group_statistics import GroupStatistics
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states
from sparseserve.models.structure import LayerStructure, OperatorGroup, trace_structure
from sparseserve.recipe.correction import CORRECTIONS
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.testing import tiny_model

CPU = torch.device("cpu")
EXPERTS = "mlp.experts"


@dataclass(frozen=True)
class Run:
    """The first layer of a tiny Mixtral about to be pruned, and a weakened copy of it."""

    context: LayerContext
    weakened: nn.Module
    structure: LayerStructure

    def statistics(self, correction: str) -> dict[str, InputStatistics]:
        """Return those of every group of an expert, by the name of its first operator."""
        groups = [group for group in self.structure.groups if group.experts is not None]
        found = GroupStatistics(self.context, self.weakened, groups, CORRECTIONS[correction])
        return {group.operators[0].name: found.of(group) for group in groups}


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    model = tiny_model("mixtral")

    def make(tokens: int, windows: int = 3) -> Run:
        generator = torch.Generator().manual_seed(5)
        drawn = [torch.randint(0, 256, (tokens,), generator=generator) for _ in range(windows)]
        structure = trace_structure(model, drawn[0])
        calls = capture_layer_calls(model, structure, drawn)
        streams = HiddenStreams.start(
            tmp_path / "hidden",
            entering_states(model, structure, drawn),
            dense=True,
            chained=False,
            keep_inputs=True,
        )
        layer = structure.layers[0]
        module = model.get_submodule(layer.name)
        weakened = copy_layer(module)
        for parameter in weakened.get_submodule("self_attn").parameters():
            parameter.mul_(0.5)
        return Run(streams.enter(module, layer, calls[0], CPU), weakened, layer)

    with unstacked_experts(model):
        yield make


def rows_of_expert(
    layer: nn.Module, run: Run, expert: int, routing: list[dict[str, Routing]] | None
) -> tuple[Tensor, list[dict[str, Routing]]]:
    """Return what an expert reads in ``layer``, by the routing given or by its own router."""
    entering: list[Tensor] = []
    chosen: list[dict[str, Routing]] = []
    handle = layer.get_submodule(EXPERTS).register_forward_pre_hook(
        lambda _, args: entering.append(args[0])
    )
    rows = []
    for number, window in enumerate(run.context.entering):
        with recorded_routing(layer) as found:
            run.context.call.apply(layer, window)
        chosen.append(dict(found))
        index = (routing or chosen)[number][EXPERTS][0]
        rows.append(entering[-1][(index == expert).any(dim=-1)])
    handle.remove()
    return torch.cat(rows).double(), chosen


def same(found: Tensor, expected: Tensor) -> None:
    """Compare sums of products: ours are added up from float32 ones."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def groups_by_stage(run: Run) -> list[OperatorGroup]:
    return [group for group in run.structure.groups if group.experts == EXPERTS]


def test_all_that_read_hidden_states_come_before_what_follows(make_run: MakeRun) -> None:
    run = make_run(40)
    names = [[operator.name for operator in group.operators] for group in groups_by_stage(run)]
    first = [[f"{EXPERTS}.{e}.gate_proj", f"{EXPERTS}.{e}.up_proj"] for e in range(4)]
    assert names == first + [[f"{EXPERTS}.{e}.down_proj"] for e in range(4)]


def test_an_expert_is_told_of_the_tokens_that_the_dense_router_sends_to_it(
    make_run: MakeRun,
) -> None:
    run = make_run(200)
    found = run.statistics("intra")
    for expert in range(4):
        dense, routing = rows_of_expert(run.context.module, run, expert, None)
        pruned, _ = rows_of_expert(run.weakened, run, expert, routing)
        own = found[f"{EXPERTS}.{expert}.gate_proj"]
        assert own.tokens == len(dense) > 64
        same(own.gram, pruned.T @ pruned)
        same(own.cross, dense.T @ pruned)
        same(own.dense_gram, dense.T @ dense)


def test_without_correction_one_moment_of_the_dense_rows_is_summed(make_run: MakeRun) -> None:
    run = make_run(200)
    own = run.statistics("none")[f"{EXPERTS}.1.gate_proj"]
    dense, _ = rows_of_expert(run.context.module, run, 1, None)
    assert not own.corrected
    same(own.gram, dense.T @ dense)


@pytest.mark.parametrize("correction", ["none", "intra"])
def test_blocks_of_any_size_give_the_same_statistics(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, correction: str
) -> None:
    run = make_run(100)
    together = run.statistics(correction)
    monkeypatch.setattr(expert_statistics, "BLOCK_BYTES", 1)
    for name, alone in run.statistics(correction).items():
        torch.testing.assert_close(alone.gram, together[name].gram)
        torch.testing.assert_close(alone.cross, together[name].cross)


def test_an_expert_with_few_tokens_is_filled_up_with_the_mean_token(make_run: MakeRun) -> None:
    run = make_run(20, windows=1)
    own = run.statistics("none")[f"{EXPERTS}.1.gate_proj"]
    rows, _ = rows_of_expert(run.context.module, run, 1, None)
    every = torch.cat(
        [rows_of_expert(run.context.module, run, expert, None)[0] for expert in range(4)]
    )
    assert 0 < len(rows) < 64
    # Each token goes to two experts.
    mean = every.T @ every / len(every)
    expected = rows.T @ rows + (64 - len(rows)) * mean
    same(own.gram, expected)


def test_inside_an_expert_with_few_tokens_each_feature_keeps_its_own_energy(
    make_run: MakeRun,
) -> None:
    run = make_run(40, windows=1)
    for expert in range(4):
        own = run.statistics("intra")[f"{EXPERTS}.{expert}.down_proj"]
        experts = experts_in(run.context.module)[EXPERTS]
        rows, _ = rows_of_expert(run.context.module, run, expert, None)
        read = inside(experts, expert, rows.float()).double()
        raw = read.T @ read
        filled = raw + torch.diag(raw.diagonal() * (128 - len(rows)) / len(rows))
        same(own.dense_gram, filled)
        assert torch.linalg.matrix_rank(own.dense_gram) == 128


def inside(experts: ExpertLinears, expert: int, rows: Tensor) -> Tensor:
    linears = experts.get_submodule(str(expert))
    gate: Tensor = linears.get_submodule("gate_proj")(rows)
    up: Tensor = linears.get_submodule("up_proj")(rows)
    return torch.nn.functional.silu(gate) * up


def test_an_expert_that_no_token_reaches_has_no_statistics(make_run: MakeRun) -> None:
    run = make_run(2, windows=1)
    tokens = {name: found.tokens for name, found in run.statistics("intra").items()}
    first = [tokens[f"{EXPERTS}.{expert}.gate_proj"] for expert in range(4)]
    assert sum(first) == 4
    assert 0 in first
    assert first == [tokens[f"{EXPERTS}.{expert}.down_proj"] for expert in range(4)]
