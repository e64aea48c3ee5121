"""Do several lambdas cost less in one stacked product, and what does every method cost?

FISTA's Gram matrix and step do not depend on lambda, so n problems of ``[out, in]`` are one of
``[n out, in]`` with a penalty a row. The rows say how far stacked and sequential results are apart,
what either takes, and which search is better at equal products: all penalties from the same start,
judged together, or one after the other from the best so far. The costs are the products of every
pruner with its defaults::

    OMP_NUM_THREADS=1 python -m benchmarks.research.stacked_penalties
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import (
    MODEL,
    OPERATORS,
    OperatorData,
    model_operators,
    small_operator,
)
from sparseserve.pruners import PRUNERS
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import fista
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import OperatorProblem, better_rows, operator_problem
from sparseserve.sparsity import TWO_FOUR

# In units of the mean absolute target.
PENALTIES = (1.0, 0.5, 0.25, 0.1)
ITERATIONS, REFIT, REPEATS = 10, 6, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Stacked against sequential on one operator; seconds of processor time, one thread.

    ``difference`` is the largest between the weights, relative to the largest weight; the errors
    are those of searches of equal cost.
    """

    operator: str
    rows: int
    columns: int
    difference: float
    sequential_seconds: float
    stacked_seconds: float
    sequential_error: float
    stacked_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a pruner took for one operator, 2:4."""

    operator: str
    method: str
    gram_products: int
    seconds: float
    calibration_error: float


def stacked(problem: OperatorProblem, count: int) -> OperatorProblem:
    """Return ``count`` copies of ``problem``, one above the other."""
    return OperatorProblem(
        problem.reference.repeat(count, 1),
        problem.gram,
        problem.target.repeat(count, 1),
        problem.pull.repeat(count, 1),
    )


def compare(operator: OperatorData) -> Row:
    plain = operator_problem(operator.weight, operator.seen, 0.01)
    problem, scale = plain.column_scaled()
    warm = PRUNERS["sparsegpt"]().prune(operator.weight, operator.seen, TWO_FOUR).weight * scale
    lipschitz = largest_eigenvalue(problem.gram)
    unit = float(problem.target.abs().mean())
    tall = stacked(problem, len(PENALTIES))
    each = torch.tensor(PENALTIES).repeat_interleave(len(warm))[:, None] * unit

    def run(problem: OperatorProblem, start: Tensor, l1: Tensor | float) -> Tensor:
        return fista(
            problem, start, l1=l1, lipschitz=lipschitz, iterations=ITERATIONS, restart=True
        ).weight

    def one_by_one() -> Tensor:
        return torch.cat([run(problem, warm, penalty * unit) for penalty in PENALTIES])

    def at_once() -> Tensor:
        return run(tall, warm.repeat(len(PENALTIES), 1), each)

    (first, first_seconds), (second, second_seconds) = _timed(one_by_one), _timed(at_once)
    chained = _refitted(problem, warm)
    together = chained
    for penalty, candidate in zip(PENALTIES, second.chunk(len(PENALTIES)), strict=True):
        together = better_rows(problem, together, _rounded(problem, candidate))
        relaxed = run(problem, chained, penalty * unit)
        chained = better_rows(problem, chained, _rounded(problem, relaxed))
    return Row(
        operator=operator.name,
        rows=warm.shape[0],
        columns=warm.shape[1],
        difference=float((first - second).abs().max() / first.abs().max()),
        sequential_seconds=first_seconds,
        stacked_seconds=second_seconds,
        sequential_error=operator.errors(chained / scale).calibration,
        stacked_error=operator.errors(together / scale).calibration,
    )


def costs(operator: OperatorData) -> Iterator[Cost]:
    """Yield the cost of every pruner with its defaults."""
    for method in PRUNERS:
        clock = time.process_time()
        found = PRUNERS[method]().prune(operator.weight, operator.seen, TWO_FOUR)
        seconds = time.process_time() - clock
        yield Cost(
            operator=operator.name,
            method=method,
            gram_products=found.gram_products,
            seconds=seconds,
            calibration_error=operator.errors(found.weight).calibration,
        )


def _rounded(problem: OperatorProblem, relaxed: Tensor) -> Tensor:
    return _refitted(problem, TWO_FOUR.project(relaxed))


def _refitted(problem: OperatorProblem, weight: Tensor) -> Tensor:
    return refit(problem, weight != 0, weight, iterations=REFIT).weight


def _timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return a result and the least time of a few runs."""
    seconds = []
    for _ in range(REPEATS):
        clock = time.process_time()
        result = work()
        seconds.append(time.process_time() - clock)
    return result, min(seconds)


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--operator", "names", multiple=True, default=OPERATORS, show_default=True)
@click.option("--smoke", is_flag=True, help="A corner of one operator, nothing written.")
def main(model: str, names: tuple[str, ...], smoke: bool) -> None:
    operators = (small_operator(),) if smoke else model_operators(model, names)
    rows: list[Row] = []
    spent: list[Cost] = []
    for operator in operators:
        rows.append(compare(operator))
        click.echo(rows[-1], err=True)
        for cost in costs(operator):
            spent.append(cost)
            click.echo(cost, err=True)
        if not smoke:
            setting = {"penalties": PENALTIES, "iterations": ITERATIONS}
            write_result(RESEARCH / "stacked-penalties.json", setting, rows=rows)
            write_result(RESEARCH / "operator-costs.json", {"pattern": "2:4"}, rows=spent)


if __name__ == "__main__":
    main()
