"""Is FISTA the right first-order method, or would ISTA, SGD, momentum or Adam do as well?

All minimise ``1/2 ||W X - W0 X||^2 + lambda ||W||_1`` from one start (Wanda's 2:4 weight) and are
compared at equal cost in products with the Gram matrix. The others use the subgradient
``lambda sign(W)``, as training with an l1 term does, in torch's own implementations; for every
budget the best of RATES, constant and linearly falling, is reported, so they get their best in
hindsight, where FISTA and ISTA have nothing to tune. ``minibatch`` rows see BATCH tokens a step
instead of the Gram matrix, for ``2 BATCH / in`` of a product, with a falling rate::

    OMP_NUM_THREADS=1 python -m benchmarks.research.first_order
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import (
    MODEL,
    OperatorData,
    model_operators,
    small_operator,
)
from sparseserve.pruners.wanda import Wanda
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import fista, kkt_residual, soft_threshold
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import OperatorProblem, operator_problem
from sparseserve.solvers.statistics import relative_output_error
from sparseserve.sparsity import TWO_FOUR

NAMES = ("3.self_attn.o_proj", "15.self_attn.q_proj", "26.mlp.gate_proj")
ROWS = 32
BUDGETS = (5, 10, 20, 50, 100, 200)
# Penalties in units of the mean absolute target.
PENALTIES = (0.02, 0.1, 0.5)
# SGD's and momentum's in units of 1 / L, Adam's in units of the mean absolute weight.
RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0, 1.9),
    "momentum": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adam": (0.003, 0.01, 0.03, 0.1, 0.3),
}
BATCH = 64
DAMPING = 0.01
REFIT = 20
# Budgets after which the weights are also rounded to 2:4 and refitted.
ROUNDED = (20, 200)

Gradient = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one problem with one budget; ``minimiser`` is the long run all are held to.

    ``gap`` is that of the objective to its minimum, relative to the gap at the start, at its best
    ``rate``. ``error_rounded`` and ``error_refitted`` are that run's relative output errors after
    rounding to 2:4 and after a refit on that mask; ``best_refitted`` is the best over the rates.
    The gap of the minimiser is a proven bound on what is left to gain.
    """

    operator: str
    coordinates: str
    penalty: float
    method: str
    products: float
    gap: float
    rate: float
    error_rounded: float | None = None
    error_refitted: float | None = None
    best_refitted: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """An l1 problem, its start, its curvature and its minimum."""

    operator: OperatorData
    coordinates: str
    penalty: float
    problem: OperatorProblem
    scale: Tensor
    l1: float
    start: Tensor
    lipschitz: float
    minimiser: Tensor
    # A proven bound on how far the minimiser's own objective is from the minimum, as a gap.
    certificate: float

    def gap(self, weight: Tensor) -> float:
        lowest = objective(self.problem, self.minimiser, self.l1)
        height = objective(self.problem, self.start, self.l1) - lowest
        return (objective(self.problem, weight, self.l1) - lowest) / height

    def rounded(self, weight: Tensor) -> tuple[float, float]:
        """Return the relative output errors of ``weight`` rounded to 2:4, and refitted."""
        # Where a group has fewer than two non-zeros, the largest dense weights fill it up: exact
        # zeros must not cost a method places that the others get by never reaching zero.
        mask = TWO_FOUR.best_mask(weight.abs() + 1e-6 * self.problem.reference.abs())
        projected = weight.where(mask, 0)
        better = refit(self.problem, mask, projected, iterations=REFIT).weight
        first, second = (
            relative_output_error(item / self.scale, self.operator.weight, self.operator.seen)
            for item in (projected, better)
        )
        return first, second


def objective(problem: OperatorProblem, weight: Tensor, l1: float) -> float:
    """Return the l1 problem's value in double precision, less a constant."""
    exact = _double(problem)
    return float(exact.loss_rows(weight.double()).sum() + l1 * weight.double().abs().sum())


def task(operator: OperatorData, coordinates: str, penalty: float, iterations: int) -> Task:
    """Build a problem and minimise it by a long run of FISTA in double precision."""
    problem = operator_problem(operator.weight, operator.seen, DAMPING)
    scale = torch.ones(len(problem.gram))
    if coordinates == "scaled":
        problem, scale = problem.column_scaled()
    l1 = penalty * float(problem.target.abs().mean())
    start = Wanda().prune(operator.weight, operator.seen, TWO_FOUR).weight * scale
    exact = _double(problem)
    lipschitz = largest_eigenvalue(exact.gram)
    minimiser = fista(
        exact,
        start.double(),
        l1=l1,
        lipschitz=lipschitz,
        iterations=iterations,
        kkt_tolerance=1e-7 * l1,
        restart=True,
    ).weight
    residual = kkt_residual(exact.gradient(minimiser), minimiser, l1).square().sum()
    # The damping alone curves every direction that much.
    curvature = DAMPING * float(operator.seen.gram.diagonal().mean() / scale.max() ** 2)
    lowest = objective(problem, minimiser, l1)
    height = objective(problem, start, l1) - lowest
    certificate = float(residual) / (2 * curvature) / height
    return Task(
        operator, coordinates, penalty, problem, scale, l1, start, lipschitz, minimiser, certificate
    )


def ista(task: Task, steps: int) -> Tensor:
    weight = task.start
    for _ in range(steps):
        moved = weight - task.problem.gradient(weight) / task.lipschitz
        weight = soft_threshold(moved, task.l1 / task.lipschitz)
    return weight


def accelerated(task: Task, steps: int, *, restart: bool) -> Tensor:
    problem, start = task.problem, task.start
    return fista(
        problem, start, l1=task.l1, lipschitz=task.lipschitz, iterations=steps, restart=restart
    ).weight


def descend(
    task: Task, kind: str, gradient: Gradient, rate: float, steps: int, *, falling: bool
) -> Tensor:
    """Run ``steps`` steps of a torch optimiser on the subgradient."""
    weight = torch.nn.Parameter(task.start.clone())
    optimizer: torch.optim.Optimizer
    if kind == "adam":
        size = rate * float(task.problem.reference.abs().mean())
        optimizer = torch.optim.Adam([weight], lr=size, foreach=False)
    else:
        size = rate / task.lipschitz
        momentum = 0.9 if kind == "momentum" else 0.0
        optimizer = torch.optim.SGD([weight], lr=size, momentum=momentum, foreach=False)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = size * (1 - step / steps if falling else 1)
        current = weight.detach()
        weight.grad = gradient(current) + task.l1 * current.sign()
        optimizer.step()
    return weight.detach()


def minibatch_gradient(task: Task) -> Gradient:
    """Estimate the gradient from BATCH tokens at a time, drawn without replacement in epochs."""
    inputs = task.operator.inputs / task.scale
    share = len(inputs) / BATCH
    ridge = DAMPING * float(task.operator.seen.gram.diagonal().mean()) / task.scale.square()
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for first in range(0, len(order) - BATCH + 1, BATCH):
                yield inputs[order[first : first + BATCH]]

    stream = batches()

    def gradient(weight: Tensor) -> Tensor:
        batch = next(stream)
        change = weight - task.problem.reference
        return share * (change @ batch.T) @ batch + change * ridge

    return gradient


def compare(task: Task, budgets: tuple[int, ...]) -> Iterator[Row]:
    """Yield the rows of the minimiser, of the start and of every method."""
    common = Row(
        operator=task.operator.name,
        coordinates=task.coordinates,
        penalty=task.penalty,
        method="minimiser",
        products=0,
        gap=task.certificate,
        rate=0,
    )
    yield _judged(common, task, [(0.0, task.minimiser.float())], gap=task.certificate)
    yield _judged(replace(common, method="start"), task, [(0.0, task.start)])
    step_cost = 2 * BATCH / len(task.problem.gram)
    for budget in budgets:
        here = replace(common, products=budget)
        solved = {
            "ista": ista(task, budget),
            "fista": accelerated(task, budget, restart=False),
            "fista, restarted": accelerated(task, budget, restart=True),
        }
        for method, weight in solved.items():
            yield _judged(replace(here, method=method), task, [(0.0, weight)])
        for kind, rates in RATES.items():
            ends = [
                (rate, descend(task, kind, task.problem.gradient, rate, budget, falling=falling))
                for rate in rates
                for falling in (False, True)
            ]
            yield _judged(replace(here, method=kind), task, ends)
            if budget not in ROUNDED:
                continue
            steps = round(budget / step_cost)
            ends = [
                (rate, descend(task, kind, minibatch_gradient(task), rate, steps, falling=True))
                for rate in rates
            ]
            yield _judged(replace(here, method=f"{kind}, minibatch"), task, ends)


def _judged(
    row: Row, task: Task, found: list[tuple[float, Tensor]], gap: float | None = None
) -> Row:
    finite = [(rate, weight) for rate, weight in found if bool(torch.isfinite(weight).all())]
    gaps = [task.gap(weight) for _, weight in finite]
    best = gaps.index(min(gaps))
    row = replace(row, gap=gaps[best] if gap is None else gap, rate=finite[best][0])
    if row.products not in (0, *ROUNDED):
        return row
    errors = [task.rounded(weight) for _, weight in finite]
    rounded, refitted = errors[best]
    return replace(
        row,
        error_rounded=rounded,
        error_refitted=refitted,
        best_refitted=min(error for _, error in errors),
    )


def _double(problem: OperatorProblem) -> OperatorProblem:
    return OperatorProblem(
        problem.reference.double(),
        problem.gram.double(),
        problem.target.double(),
        problem.pull.double(),
    )


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--operator", "names", multiple=True, default=NAMES, show_default=True)
@click.option("--coordinates", multiple=True, default=("scaled", "plain"), show_default=True)
@click.option(
    "--smoke", is_flag=True, help="A corner of one operator, one budget, nothing written."
)
def main(model: str, names: tuple[str, ...], coordinates: tuple[str, ...], smoke: bool) -> None:
    operators = (small_operator(),) if smoke else model_operators(model, names)
    budgets, iterations = ((20,), 500) if smoke else (BUDGETS, 6000)
    products = {item.name: item.seen.tokens / len(item.weight) for item in operators}
    setting = {"rows": ROWS, "batch": BATCH, "rates": RATES, "gram_costs_products": products}
    rows = []
    for kind, operator, penalty in itertools.product(coordinates, operators, PENALTIES):
        problem = task(operator.rows(4 if smoke else ROWS), kind, penalty, iterations)
        rows += list(compare(problem, budgets))
        click.echo(f"{operator.name} {kind} {penalty}: {rows[-1]}", err=True)
        if not smoke:
            write_result(RESEARCH / "first-order.json", setting, rows=rows)


if __name__ == "__main__":
    main()
