"""How should lambda be searched: bisection, a grid, or Bayesian optimisation?

A trial runs FISTA with one lambda from a fixed start, rounds to 2:4, refits for a few steps and
is judged by the relative output error; the best trial counts. Bisection follows the paper's rule
(raise lambda while rounding makes more than 0.3 of the error), on the paper's interval and on a
relative one. The grid spends half of its trials on a geometric grid over the whole interval and
half between the neighbours of the best point. Optuna's TPE runs with its Hyperband pruner (BOHB:
a poor trial ends early and its products are saved) and without::

    pip install -e '.[research]'
    OMP_NUM_THREADS=1 python -m benchmarks.research.penalty_search
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import click
import optuna
import torch
from torch import Tensor

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import (
    MODEL,
    OperatorData,
    model_operators,
    small_operator,
)
from sparseserve.pruners.one_shot import ONE_SHOT
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import fista
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import operator_problem
from sparseserve.solvers.statistics import relative_output_error
from sparseserve.sparsity import TWO_FOUR

NAMES = ("3.self_attn.o_proj", "15.self_attn.q_proj", "15.mlp.down_proj", "26.mlp.gate_proj")
STARTS = ("wanda", "sparsegpt")
ROWS = 128
# Lambda in units of the mean absolute target.
LOWEST, HIGHEST = 0.003, 10.0
PAPER_FIRST, PAPER_HIGHEST, ROUNDING_RATIO = 1e-5, 1e6, 0.3
# FISTA steps after which a trial is judged; only the last counts where nothing is pruned.
RUNGS = (5, 10, 20)
REFIT = 6
JUDGEMENT = REFIT + 1
TRIALS = (4, 8, 16)
SEEDS = (0, 1, 2)
SCAN = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The best error after a number of trials, or after as many products as those take in full.

    ``scan_error`` is the best of a scan of SCAN values, ``start_error`` that of the refitted start.
    """

    operator: str
    start: str
    method: str
    seed: int
    equal: str
    budget: int
    error: float
    scan_error: float
    start_error: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One value of lambda: its error, the share of rounding in it, and its cost in products."""

    error: float
    rounding: float
    products: int


Evaluate = Callable[[float, int], Trial]


def evaluator(operator: OperatorData, start: str) -> tuple[Evaluate, float]:
    """Return a function of a relative lambda and the FISTA steps, and the lambda of 1 in the paper.

    0 steps judge the start. The paper's columns are not scaled, so its lambda is that of a column
    of mean scale here.
    """
    plain = operator_problem(operator.weight, operator.seen, 0.01)
    problem, scale = plain.column_scaled()
    warm = ONE_SHOT[start].prune(operator.weight, operator.seen, TWO_FOUR).weight * scale
    lipschitz = largest_eigenvalue(problem.gram)
    unit = float(problem.target.abs().mean())

    def size(change: Tensor) -> float:
        return math.sqrt(max(float(((change @ problem.gram) * change).sum()), 0.0))

    def evaluate(penalty: float, steps: int) -> Trial:
        relaxed = warm
        if steps:
            l1 = penalty * unit
            relaxed = fista(
                problem, warm, l1=l1, lipschitz=lipschitz, iterations=steps, restart=True
            ).weight
        rounded = TWO_FOUR.project(relaxed)
        ratio = size(relaxed - rounded) / size(rounded - problem.reference)
        found = refit(problem, rounded != 0, rounded, iterations=REFIT).weight / scale
        error = relative_output_error(found, operator.weight, operator.seen)
        return Trial(error, ratio, steps + JUDGEMENT)

    return evaluate, unit * float(scale.mean())


def bisection(evaluate: Evaluate, trials: int, first: float, highest: float) -> list[Trial]:
    low, high, penalty = 0.0, highest, first
    found = []
    for _ in range(trials):
        found.append(evaluate(penalty, RUNGS[-1]))
        if found[-1].rounding > ROUNDING_RATIO:
            low = penalty
        else:
            high = penalty
        penalty = (low + high) / 2
    return found


def grid(evaluate: Evaluate, trials: int) -> list[Trial]:
    coarse = geometric(LOWEST, HIGHEST, math.ceil(trials / 2))
    found = [evaluate(penalty, RUNGS[-1]) for penalty in coarse]
    best = min(range(len(found)), key=lambda index: found[index].error)
    ends = coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)]
    between = geometric(*ends, trials - len(coarse) + 2)[1:-1]
    return found + [evaluate(penalty, RUNGS[-1]) for penalty in between]


def bayesian(
    evaluate: Evaluate, trials: int, products: int, seed: int, *, hyperband: bool
) -> list[Trial]:
    """Run TPE for at least so many ``trials`` and ``products``; a pruned trial costs less."""
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if hyperband:
        pruner = optuna.pruners.HyperbandPruner(
            min_resource=RUNGS[0], max_resource=RUNGS[-1], reduction_factor=2
        )
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    found: list[Trial] = []
    while len(found) < trials or sum(trial.products for trial in found) < products:
        trial = study.ask()
        penalty = trial.suggest_float("penalty", LOWEST, HIGHEST, log=True)
        judged: list[Trial] = []
        for steps in RUNGS if hyperband else RUNGS[-1:]:
            judged.append(evaluate(penalty, steps))
            trial.report(judged[-1].error, steps)
            if steps < RUNGS[-1] and trial.should_prune():
                break
        # The run goes on from rung to rung, so its steps are paid for once.
        cost = judged[-1].products + JUDGEMENT * (len(judged) - 1)
        best = min(item.error for item in judged)
        found.append(Trial(best, judged[-1].rounding, cost))
        done = len(judged) == len(RUNGS) or not hyperband
        state = optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.PRUNED
        study.tell(trial, judged[-1].error if done else None, state=state)
    return found


def compare(operator: OperatorData, start: str, trials: Sequence[int]) -> Iterator[Row]:
    """Yield the rows of every method."""
    evaluate, paper_unit = evaluator(operator, start)
    full = RUNGS[-1] + JUDGEMENT
    most = max(trials)
    scan = min(evaluate(item, RUNGS[-1]).error for item in geometric(LOWEST, HIGHEST, SCAN))
    alone = evaluate(0, 0).error
    runs: list[tuple[str, int, list[Trial]]] = [
        (
            "bisection, the paper's interval",
            0,
            bisection(evaluate, most, PAPER_FIRST / paper_unit, PAPER_HIGHEST / paper_unit),
        ),
        ("bisection, relative interval", 0, bisection(evaluate, most, LOWEST, HIGHEST)),
    ]
    for seed in SEEDS:
        for name, hyperband in (("TPE", False), ("TPE with Hyperband", True)):
            found = bayesian(evaluate, most, most * full, seed, hyperband=hyperband)
            runs.append((name, seed, found))
    for count in trials:
        for name, seed, found in [*runs, ("grid and refinement", 0, grid(evaluate, count))]:
            for equal, best in (
                ("trials", min(trial.error for trial in found[:count])),
                ("products", within(found, count * full)),
            ):
                yield Row(
                    operator=operator.name,
                    start=start,
                    method=name,
                    seed=seed,
                    equal=equal,
                    budget=count if equal == "trials" else count * full,
                    error=best,
                    scan_error=scan,
                    start_error=alone,
                )


def within(found: Sequence[Trial], products: int) -> float:
    """Return the best error of the trials that end within so many ``products``."""
    best, spent = math.inf, 0
    for trial in found:
        spent += trial.products
        if spent <= products:
            best = min(best, trial.error)
    return best


def geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (index / max(count - 1, 1)) for index in range(count)]


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--operator", "names", multiple=True, default=NAMES, show_default=True)
@click.option("--smoke", is_flag=True, help="A corner of one operator, nothing written.")
def main(model: str, names: tuple[str, ...], smoke: bool) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.manual_seed(0)
    operators = (small_operator(),) if smoke else model_operators(model, names)
    setting = {"rows": ROWS, "optuna": optuna.__version__, "rungs": RUNGS, "refit": REFIT}
    rows = []
    for operator in operators:
        for start in STARTS[:1] if smoke else STARTS:
            part = operator.rows(4 if smoke else ROWS)
            rows += list(compare(part, start, (3,) if smoke else TRIALS))
            click.echo(f"{operator.name} {start}: {rows[-1]}", err=True)
            if not smoke:
                write_result(RESEARCH / "penalty-search.json", setting, rows=rows)


if __name__ == "__main__":
    main()
