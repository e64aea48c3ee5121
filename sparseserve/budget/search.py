"""The search for the largest prediction whose measurement stays within a budget.

An additive model predicts the loss from the prices of single units; the truth is measured by
pruning. The two rise together, so a few rounds bracket the prediction at which the measurement
meets the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Share of the budget that a round aims at: the last percents are not worth a failed round.
AIM = 0.97
# No guess lies nearer to an end of the bracket than this share of it.
_MARGIN = 0.1
# A first measurement far below the budget says little about predictions much larger.
_LARGEST_STEP = 3.0


@dataclass(frozen=True, slots=True)
class Trial:
    """A round: what was predicted and the bound that was measured, in nats a token."""

    predicted: float
    measured: float


def next_prediction(trials: Sequence[Trial], budget: float) -> float | None:
    """Return what to predict in the next round; None if the best trial uses up ``budget``.

    The first round believes the prediction. Later ones interpolate linearly between the best trial
    within the budget, which at worst is the dense model, and the least one beyond it.
    """
    if not trials:
        return budget
    within = max((t for t in trials if t.measured <= budget), key=_predicted, default=Trial(0, 0))
    beyond = min((t for t in trials if t.measured > budget), key=_predicted, default=None)
    aim = AIM * budget
    if within.measured >= aim:
        return None
    if beyond is None:
        step = aim / within.measured if within.measured > 0 else _LARGEST_STEP
        return within.predicted * min(step, _LARGEST_STEP)
    width = beyond.predicted - within.predicted
    share = (aim - within.measured) / (beyond.measured - within.measured)
    return within.predicted + width * min(max(share, _MARGIN), 1 - _MARGIN)


def _predicted(trial: Trial) -> float:
    return trial.predicted
