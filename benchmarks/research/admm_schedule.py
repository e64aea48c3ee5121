"""How fast may the penalty of ADMM grow, and where may it begin?

The default recipe pulls each weight towards the dense one (``damping``), next to which a small
penalty does little. Every schedule solves the same operators; what is left of the error after the
refit is compared with that of the first one, and so are the updates that it took::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.research.admm_schedule
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import MODEL, OperatorData, model_operators, small_operator
from sparseserve.pruners.admm import Admm
from sparseserve.solvers.admm import admm
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.problem import operator_problem
from sparseserve.sparsity import TWO_FOUR

OPERATORS = (
    *("3.self_attn.o_proj", "8.mlp.up_proj", "15.self_attn.q_proj"),
    *("15.mlp.gate_proj", "26.mlp.down_proj"),
)
DAMPINGS = (0.01, 0.1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The knobs of ``Admm`` that differ."""

    first_penalty: float = 0.1
    growth: float = 1.3
    interval: int = 3


SCHEDULES = (
    Schedule(),
    Schedule(first_penalty=0.03),
    Schedule(first_penalty=0.2),
    Schedule(first_penalty=0.3),
    Schedule(first_penalty=0.5),
    Schedule(interval=2),
    Schedule(growth=1.5),
    Schedule(growth=1.7),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One operator under one schedule; errors are relative, updates those of ``W``."""

    operator: str
    damping: float
    first_penalty: float
    growth: float
    interval: int
    calibration_error: float
    heldout_error: float
    updates: int


def measure(operator: OperatorData, damping: float, schedule: Schedule) -> Row:
    """Solve, and refit as ``Admm`` does."""
    usual = Admm(damping=damping)
    problem = operator_problem(operator.weight, operator.seen, damping)
    scaled, scale = problem.column_scaled()
    found = admm(
        scaled,
        TWO_FOUR,
        first_penalty=schedule.first_penalty,
        growth=schedule.growth,
        interval=schedule.interval,
        settled=usual.settled,
        iterations=usual.iterations,
    )
    weight = found.weight / scale
    steps = usual.candidate_refit + usual.final_refit
    errors = operator.errors(refit(problem, weight != 0, weight, iterations=steps).weight)
    return Row(
        operator=operator.name,
        damping=damping,
        first_penalty=schedule.first_penalty,
        growth=schedule.growth,
        interval=schedule.interval,
        calibration_error=errors.calibration,
        heldout_error=errors.heldout,
        updates=found.iterations,
    )


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--operator", "names", multiple=True, default=OPERATORS, show_default=True)
@click.option("--smoke", is_flag=True, help="A corner of one operator, nothing written.")
def main(model: str, names: Sequence[str], smoke: bool) -> None:
    operators = (small_operator(),) if smoke else model_operators(model, names)
    rows = []
    for damping in DAMPINGS:
        for schedule in SCHEDULES:
            rows += [measure(operator, damping, schedule) for operator in operators]
            click.echo(str(rows[-1]), err=True)
    if not smoke:
        write_result(RESEARCH / "admm-schedule.json", {"pattern": str(TWO_FOUR)}, rows=rows)


if __name__ == "__main__":
    main()
