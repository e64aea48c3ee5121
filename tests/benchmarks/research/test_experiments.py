"""The experiments on operators and decoder layers run, and compare like with like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.research import (
    admm_schedule,
    first_order,
    gradient_blocks,
    operators,
    stacked_penalties,
    warm_starts,
)
from benchmarks.research.operator_data import (
    Windows,
    decoder_layers,
    model_operators,
    small_operator,
)
from benchmarks.research.tables import RESEARCH_TABLES
from sparseserve.pruners import PRUNERS
from sparseserve.solvers.problem import operator_problem
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import save_tiny_model
from tests.benchmarks.script_runs import smoke_run, table_cells

pytestmark = pytest.mark.research


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    "script",
    [admm_schedule, first_order, operators, stacked_penalties, warm_starts],
    ids=lambda script: script.__name__.split(".")[-1],
)
def test_a_smoke_run_measures_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    smoke_run(script, monkeypatch)


def test_blocks_are_trained_and_stay_in_the_pattern(tiny: Path) -> None:
    layer = next(decoder_layers(str(tiny), (0,), Windows(samples=1, heldout=1, length=16)))
    block = gradient_blocks.Block.of(layer)
    free, steps = gradient_blocks.train(block, {}, 0.2, rate=1e-3, penalty=0.1, masked=False)
    start = gradient_blocks.rounded(block, free)
    kept, _ = gradient_blocks.train(block, start, 0.2, rate=1e-3, penalty=0, masked=True)
    assert steps > 0
    for name, weight in kept.items():
        assert TWO_FOUR.first_violation(weight) is None
        assert not torch.equal(weight, start[name])
    refitted = gradient_blocks.refitted(block, start)
    before, after = (block.row("", weights, 0.0).calibration_error for weights in (start, refitted))
    assert after < before


def test_operators_see_the_dense_model_on_windows_that_do_not_overlap(tiny: Path) -> None:
    windows = Windows(samples=2, heldout=1, length=16)
    (found,) = model_operators(str(tiny), ["1.mlp.down_proj"], windows)
    assert found.seen.tokens == len(found.inputs) == 32
    assert found.other.tokens == 16
    torch.testing.assert_close(found.inputs.T @ found.inputs, found.seen.gram.float())
    assert found.errors(found.weight).heldout == 0
    assert found.errors(torch.zeros_like(found.weight)).heldout == pytest.approx(1)


def test_minibatch_gradients_of_an_epoch_average_to_the_gradient() -> None:
    problem = first_order.task(small_operator(), "scaled", 0.1, 50)
    weight = problem.start
    gradient = first_order.minibatch_gradient(problem)
    batches = len(problem.operator.inputs) // first_order.BATCH
    mean = sum((gradient(weight) for _ in range(batches)), torch.zeros_like(weight)) / batches
    torch.testing.assert_close(mean, problem.problem.gradient(weight), rtol=1e-3, atol=1e-3)


def test_no_method_gets_below_the_minimum() -> None:
    problem = first_order.task(small_operator(), "scaled", 0.1, 3000)
    assert problem.certificate < 1e-6
    for steps in (1, 10, 100):
        gaps = (
            problem.gap(first_order.accelerated(problem, steps, restart=True)),
            problem.gap(first_order.ista(problem, steps)),
        )
        assert min(gaps) > -1e-6
    assert problem.gap(problem.start) == pytest.approx(1)


def test_stacked_penalties_give_what_they_give_one_by_one() -> None:
    row = stacked_penalties.compare(small_operator())
    assert row.difference < 1e-5


def test_a_stack_is_its_parts_one_above_the_other() -> None:
    operator = small_operator()
    problem = operator_problem(operator.weight, operator.seen, 0.01)
    weight = torch.randn(2 * len(operator.weight), operator.weight.shape[1])
    upper, lower = weight.chunk(2)
    stack = stacked_penalties.stacked(problem, 2)
    expected = torch.cat([problem.gradient(upper), problem.gradient(lower)])
    torch.testing.assert_close(stack.gradient(weight), expected)


def test_the_table_of_starts_is_relative_to_wanda() -> None:
    operator = small_operator()
    rows = [
        row
        for start in ("wanda", "dense")
        for row in warm_starts.measure(operator, TWO_FOUR, start)
    ]
    head, wanda, dense = table_cells(RESEARCH_TABLES["warm-starts"], rows)
    assert head == ["start, 2:4", "as it is", "refit", "fista, no refit", "fista"]
    assert wanda[:2] == ["wanda", "1.000 / 1.000"]
    assert all(float(cell.split(" / ")[0]) <= 1 for cell in [*wanda[1:], *dense[1:]])


def test_the_table_of_methods_has_every_budget_and_penalty() -> None:
    problem = first_order.task(small_operator(), "scaled", 0.1, 500)
    cells = table_cells(
        RESEARCH_TABLES["first-order"], first_order.compare(problem, (5, 20)), rows=16, batch=64
    )
    assert cells[0] == ["gap to the minimum, scaled columns", "5", "20"]
    assert cells[-1][0] == "minimiser"
    fista = next(line for line in cells if line[0] == "fista")
    assert float(fista[2]) < float(fista[1]) < 1


def test_the_tables_of_costs_name_every_operator() -> None:
    operator = small_operator()
    (_, row) = table_cells(
        RESEARCH_TABLES["stacked-penalties"],
        [stacked_penalties.compare(operator)],
        penalties=[1],
        iterations=10,
    )
    assert row[0] == f"{operator.name}, 16 x 64"
    head, *lines = table_cells(
        RESEARCH_TABLES["operator-costs"], stacked_penalties.costs(operator), pattern="2:4"
    )
    assert head == ["products with G", operator.name]
    assert [line[0] for line in lines] == list(PRUNERS)


def test_the_table_of_blocks_shows_the_best_of_a_grid() -> None:
    row = gradient_blocks.Row(
        layer=1, method="a", seconds=2, calibration_error=0.5, heldout_error=0.4
    )
    worse = replace(row, heldout_error=0.6)
    head, line = table_cells(RESEARCH_TABLES["gradient-blocks"], [worse, row], tokens=8)
    assert head == ["method", "layer 1, held-out", "layer 1, calibration", "seconds"]
    assert line == ["a", "0.4000", "0.5000", "2"]
