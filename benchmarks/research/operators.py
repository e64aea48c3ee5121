"""How well does each method solve one real operator, and at what cost?

Prunes the operator in tests/data with every pruner, and with FISTA in the variants that were
tried on the way to its defaults. The error is ``||W X - W0 X|| / ||W0 X||`` on the calibration
tokens and on others; the cost is counted in products with the Gram matrix::

    python -m benchmarks.research.operators
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import click
import torch
from torch import Tensor

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import OperatorData, fixture_operator
from sparseserve.pruners import PRUNERS, PrunedWeight, Pruner
from sparseserve.pruners.fista import Fista
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import soft_threshold
from sparseserve.solvers.linalg import largest_eigenvalue
from sparseserve.solvers.problem import operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import TWO_FOUR, SparsityPattern, UnstructuredPattern

PATTERNS: tuple[SparsityPattern, ...] = (TWO_FOUR, UnstructuredPattern(0.5))


@dataclass(frozen=True, slots=True)
class RisingPenalty:
    """FISTA from the dense weight; the penalty on what each group must lose rises step by step.

    The analogue, with first-order steps, of ADMM's growing penalty.
    """

    lowest: float = 0.003
    highest: float = 3.0
    stages: int = 15
    iterations: int = 10
    refit: int = 30

    rows_are_independent: ClassVar[bool] = False

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        problem, scale = operator_problem(dense_weight, statistics, 0.01).column_scaled()
        lipschitz = largest_eigenvalue(problem.gram)
        unit = float(problem.target.abs().mean()) / lipschitz
        weight = point = problem.reference
        momentum = 1.0
        for penalty in torch.logspace(0, 1, self.stages).log10().tolist():
            threshold = unit * self.lowest * (self.highest / self.lowest) ** penalty
            for _ in range(self.iterations):
                moved = point - problem.gradient(point) / lipschitz
                keep = pattern.best_mask(moved.abs())
                updated = torch.where(keep, moved, soft_threshold(moved, threshold))
                if bool(((point - updated) * (updated - weight)).sum() > 0):
                    momentum = 1.0
                following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
                point = updated + (momentum - 1) / following * (updated - weight)
                weight, momentum = updated, following
        mask = pattern.best_mask(weight.abs())
        found = refit(problem, mask, weight.where(mask, 0), iterations=self.refit)
        products = self.stages * self.iterations + found.iterations
        return PrunedWeight(found.weight / scale, products)


def variants() -> dict[str, Pruner]:
    """The pruners as they are, then what was tried with FISTA."""
    falling = tuple(torch.logspace(0.5, -2, 12).tolist())
    return {
        **{name: kind() for name, kind in PRUNERS.items()},
        "sparsegpt, refitted": Fista(warm_start="sparsegpt", penalties=()),
        "fista from sparsegpt, 4 falling penalties, 10 + 6": Fista(
            warm_start="sparsegpt", penalties=(1.0, 0.5, 0.25, 0.1)
        ),
        "fista from sparsegpt, 12 falling penalties, 20 + 10": Fista(
            warm_start="sparsegpt", penalties=falling, iterations=20, candidate_refit=10
        ),
        "fista from sparsegpt, 12 rising penalties, 20 + 10": Fista(
            warm_start="sparsegpt", penalties=falling[::-1], iterations=20, candidate_refit=10
        ),
        "fista from wanda, 4 falling penalties, 10 + 6": Fista(
            warm_start="wanda", penalties=(1.0, 0.5, 0.25, 0.1)
        ),
        "fista from the dense weight, rising penalty": RisingPenalty(),
    }


def measure(pruner: Pruner, pattern: SparsityPattern, operator: OperatorData) -> dict[str, object]:
    start = time.perf_counter()
    result = pruner.prune(operator.weight, operator.seen, pattern)
    seconds = time.perf_counter() - start
    errors = operator.errors(result.weight)
    return {
        "pattern": str(pattern),
        "calibration_error": errors.calibration,
        "heldout_error": errors.heldout,
        "gram_products": result.gram_products,
        "seconds": seconds,
    }


@click.command()
@click.option("--result", default="operators.json", show_default=True)
@click.option("--smoke", is_flag=True, help="Wanda only, nothing written: does the script run?")
def main(result: str, smoke: bool) -> None:
    operator = fixture_operator()
    chosen = {"wanda": PRUNERS["wanda"]()} if smoke else variants()
    rows = []
    for name, pruner in chosen.items():
        for pattern in PATTERNS:
            rows.append({"method": name, **measure(pruner, pattern, operator)})
            click.echo(rows[-1], err=True)
    if not smoke:
        setting = {"operator": operator.name, "patterns": list(map(str, PATTERNS))}
        write_result(RESEARCH / result, setting, rows=rows)


if __name__ == "__main__":
    main()
