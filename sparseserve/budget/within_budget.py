"""Pruning as much of a model as a budget of loss allows.

Each unit is pruned alone and its price measured (``prices.py``). An exact knapsack over these
prices (``knapsack.py``) names the units to prune for any predicted loss. The model is pruned so,
and measured on windows that neither pruning nor the prices saw; since prices do not simply add up,
the prediction is corrected by what was measured, a few times (``search.py``). Of the models
within the budget the one with the most pruned weights is published.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from sparseserve.budget.knapsack import Frontier, Unit
from sparseserve.budget.price_run import HeldOutSpec, SensitivityRun
from sparseserve.budget.report import BudgetReport, Goal, MaxPerplexityIncrease, Round
from sparseserve.budget.rounds import BudgetWork
from sparseserve.budget.search import Trial, next_prediction
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.errors import RecipeError
from sparseserve.exporters.model_card import finish_checkpoint
from sparseserve.workflow.job import Job

# A further round must promise to prune so much more of the weights that may be pruned.
WORTH_A_ROUND = 0.005


def prune_within_budget(
    job: Job,
    out: Path,
    goal: Goal,
    *,
    held_out: HeldOutSpec | None = None,
    rounds: int = 4,
) -> tuple[Artifact, BudgetReport]:
    """Prune a model into ``out``, with some operators left dense as ``goal`` demands.

    A run that is killed leaves ``OUT.partial``; the same call, also with another goal, goes on.

    Args:
        job: The model, and how to prune it. What its recipe ignores stays dense and is no part of
            the shares.
        out: Must be absent or empty; appears whole at the end.
        goal: How much loss, or how much that is dense.
        held_out: What to measure on.
        rounds: Most models that are pruned and measured in search of a budget.

    Raises:
        RecipeError: Only the dense model is within the budget, or nothing better was found.
        SparseServeError: Of another kind, from pruning; nothing is left at ``out``.
    """
    spec = held_out or HeldOutSpec()
    with SensitivityRun.open(job, out, spec) as run:
        units = run.sensitivities()
        work = BudgetWork(run, units)
        frontier = Frontier.of([Unit(unit.weights, unit.divergence) for unit in units])
        if isinstance(goal, MaxPerplexityIncrease):
            tried = _search(work, frontier, goal, rounds)
            chosen = _best(tried, math.log1p(goal.share))
            assert chosen is not None
        else:
            chosen = work.round(frontier.with_weights((1 - goal.fraction) * work.prunable))
            tried = (chosen,)
        return _publish(work, goal, chosen, tried)


def _search(
    work: BudgetWork, frontier: Frontier, goal: MaxPerplexityIncrease, rounds: int
) -> tuple[Round, ...]:
    """Return the rounds it took, at least one of them within the budget.

    Raises:
        RecipeError: None is.
    """
    budget = math.log1p(goal.share)
    tried: list[Round] = []
    while len(tried) < rounds:
        wanted = next_prediction([Trial(item.predicted, item.bound) for item in tried], budget)
        if wanted is None:
            break
        allocation = frontier.within_price(wanted)
        best = _best(tried, budget)
        least = best.sparse_share + WORTH_A_ROUND if best else 0
        if allocation.weights <= least * work.prunable:
            break
        found = work.round(allocation)
        if found in tried:
            break
        tried.append(found)
        _keep_only(work, tried, _best(tried, budget))
    if _best(tried, budget) is None:
        raise RecipeError(_nothing_within(work, goal, tried))
    return tuple(tried)


def _best(tried: Sequence[Round], budget: float) -> Round | None:
    """Return the round with the most pruned among those within ``budget`` nats; None if none is."""
    within = [item for item in tried if item.bound <= budget]
    return max(within, key=lambda item: item.sparse_share, default=None)


def _keep_only(work: BudgetWork, tried: Sequence[Round], best: Round | None) -> None:
    """Remove the checkpoints of all rounds but the ``best``."""
    for item in tried:
        if item != best:
            shutil.rmtree(work.folder(item.dense_operators), ignore_errors=True)


def _nothing_within(work: BudgetWork, goal: MaxPerplexityIncrease, tried: Sequence[Round]) -> str:
    asked = f"--max-perplexity-increase {goal.share:.4g}"
    if not tried:
        cheapest = min(work.units, key=lambda unit: unit.divergence)
        return (
            f"{asked}: pruning {cheapest.label} alone, the cheapest of {len(work.units)}, raises "
            f"the perplexity by {math.expm1(cheapest.divergence):.2%}: allow more, or stay dense"
        )
    nearest = min(tried, key=lambda item: item.bound)
    return (
        f"{asked}: none of {len(tried)} pruned models stays within it; the nearest has "
        f"{nearest.sparse_share:.1%} of its weights pruned and an increase of up to "
        f"{math.expm1(nearest.bound):.2%}, margin included: allow more, or stay dense"
    )


def _publish(
    work: BudgetWork, goal: Goal, chosen: Round, tried: tuple[Round, ...]
) -> tuple[Artifact, BudgetReport]:
    """Write what was found into manifest and card, and move the checkpoint to the output."""
    artifact = work.result(chosen.dense_operators)
    report = BudgetReport(
        goal=goal,
        chosen=chosen,
        rounds=tried,
        sensitivities=work.units,
        prunable_weights=work.prunable,
        weight_bytes=artifact.weight_bytes,
        dense_bytes=work.run.dense_bytes,
    )
    manifest = artifact.manifest
    # What chose the operators has no business in judging them: evaluation refuses these texts too.
    sources = {source["sha256"]: source for source in manifest.calibration["sources"]}
    for text in work.run.texts:
        sources |= {file.sha256: asdict(file) for file in text.files}
    complete = replace(
        manifest,
        report={**manifest.report, "budget": asdict(report)},
        calibration={**manifest.calibration, "sources": list(sources.values())},
        files={},
    )
    finish_checkpoint(artifact.path, complete)
    out = work.run.folder.out
    work.run.folder.publish(artifact.path)
    return Artifact.open(out), report
