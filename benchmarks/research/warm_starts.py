"""What does FISTA add to each warm start, and how much of it is the refit?

Every start gets the same four treatments: as it is; a refit of its mask; FISTA over the same
falling penalties, judged without a refit; and the same with a refit of every candidate. ``dense``
starts FISTA from the dense weight at every penalty; rounded in scaled columns that is Wanda, which
stands in its first columns::

    OMP_NUM_THREADS=1 python -m benchmarks.research.warm_starts
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import click
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
from sparseserve.solvers.problem import OperatorProblem, better_candidate, operator_problem
from sparseserve.sparsity import SparsityPattern

STARTS = ("dense", "magnitude", "wanda", "ria", "dsnot", "sparsegpt", "admm-gradual", "admm")
# Lambda in units of the mean absolute target.
PENALTIES = (1.0, 0.5, 0.25, 0.1)
ITERATIONS = 10
CANDIDATE_REFIT = 6
FINAL_REFIT = 40
DAMPING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One start with one treatment; ``seconds`` are of processor time, one thread."""

    operator: str
    pattern: str
    start: str
    treatment: str
    calibration_error: float
    heldout_error: float
    gram_products: int
    seconds: float


def treated(
    problem: OperatorProblem, pattern: SparsityPattern, start: Tensor, origin: Tensor | None
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield treatment, weight and products, in scaled columns; ``origin`` replaces FISTA's start.

    Candidates are kept row by row, so no treatment is worse than what it starts from.
    """
    yield "as it is", start, 0
    yield "refit", refit(problem, start != 0, start, iterations=FINAL_REFIT).weight, FINAL_REFIT
    lipschitz = largest_eigenvalue(problem.gram)
    unit = float(problem.target.abs().mean())
    for name, judged_after in (("fista, no refit", 0), ("fista", CANDIDATE_REFIT)):
        best = _refitted(problem, start, judged_after)
        for penalty in PENALTIES:
            relaxed = fista(
                problem,
                best if origin is None else origin,
                l1=penalty * unit,
                lipschitz=lipschitz,
                iterations=ITERATIONS,
                restart=True,
            ).weight
            candidate = _refitted(problem, pattern.project(relaxed), judged_after)
            best = better_candidate(problem, pattern, best, candidate)
        last = FINAL_REFIT if judged_after else 0
        best = _refitted(problem, best, last)
        comparisons = 2 * len(PENALTIES)
        steps = len(PENALTIES) * (ITERATIONS + 1 + judged_after) + judged_after + last
        yield name, best, steps + comparisons


def measure(operator: OperatorData, pattern: SparsityPattern, start: str) -> Iterator[Row]:
    """Yield the rows of one start."""
    plain = operator_problem(operator.weight, operator.seen, DAMPING)
    problem, scale = plain.column_scaled()
    kind = PRUNERS["wanda" if start == "dense" else start]
    clock = time.process_time()
    found = kind().prune(operator.weight, operator.seen, pattern)
    began = time.process_time() - clock
    origin = problem.reference if start == "dense" else None
    clock = time.process_time()
    for treatment, weight, products in treated(problem, pattern, found.weight * scale, origin):
        seconds = time.process_time() - clock
        errors = operator.errors(weight / scale)
        yield Row(
            operator=operator.name,
            pattern=str(pattern),
            start=start,
            treatment=treatment,
            calibration_error=errors.calibration,
            heldout_error=errors.heldout,
            gram_products=found.gram_products + products,
            seconds=began + seconds,
        )
        clock = time.process_time()


def _refitted(problem: OperatorProblem, weight: Tensor, iterations: int) -> Tensor:
    if not iterations:
        return weight
    return refit(problem, weight != 0, weight, iterations=iterations).weight


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--operator", "names", multiple=True, default=OPERATORS, show_default=True)
@click.option("--smoke", is_flag=True, help="A corner of one operator, nothing written.")
def main(model: str, names: tuple[str, ...], smoke: bool) -> None:
    operators = (small_operator(),) if smoke else model_operators(model, names)
    setting = {"penalties": PENALTIES, "iterations": ITERATIONS, "refit": CANDIDATE_REFIT}
    rows = []
    for operator in operators:
        for pattern in (SparsityPattern.parse(text) for text in ("2:4", "50%")):
            for start in STARTS:
                rows += list(measure(operator, pattern, start))
                click.echo(f"{operator.name} {rows[-1]}", err=True)
        if not smoke:
            write_result(RESEARCH / "warm-starts.json", setting, rows=rows)


if __name__ == "__main__":
    main()
