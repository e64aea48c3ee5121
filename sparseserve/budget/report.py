"""What is asked of a search within a budget, and what it says it did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparseserve.budget.prices import UnitSensitivity
from sparseserve.errors import RecipeError

# A measured increase counts as this many standard errors more than it is.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class MaxPerplexityIncrease:
    """Prune as much as possible while the perplexity rises by no more than ``share``."""

    share: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.share) and self.share > 0):
            raise RecipeError(f"--max-perplexity-increase {self.share:.4g} must be above 0")


@dataclass(frozen=True, slots=True)
class KeepDenseFraction:
    """Lose as little as possible with at most ``fraction`` of the prunable weights left dense."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise RecipeError(
                f"--keep-dense-fraction {self.fraction:.4g} must be at least 0 and below 1"
            )


Goal = MaxPerplexityIncrease | KeepDenseFraction


@dataclass(frozen=True, slots=True)
class TextIncrease:
    """What pruning costs on the validation windows of one text.

    Attributes:
        text: Its name.
        dense_perplexity: Of the dense model.
        perplexity: Of the pruned one.
        increase: ln(perplexity) - ln(dense_perplexity).
        standard_error: Of the increase, from its spread over the windows.
    """

    text: str
    dense_perplexity: float
    perplexity: float
    increase: float
    standard_error: float

    @property
    def bound(self) -> float:
        """The increase and a margin of STANDARD_ERRORS, in nats a token."""
        return self.increase + STANDARD_ERRORS * self.standard_error

    @classmethod
    def of(cls, text: str, dense: Sequence[float], pruned: Sequence[float]) -> TextIncrease:
        """Compare mean negative log-likelihoods window by window, at least two windows."""
        rises = [after - before for before, after in zip(dense, pruned, strict=True)]
        return cls(
            text=text,
            dense_perplexity=math.exp(statistics.fmean(dense)),
            perplexity=math.exp(statistics.fmean(pruned)),
            increase=statistics.fmean(rises),
            standard_error=statistics.stdev(rises) / math.sqrt(len(rises)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pruned and measured model.

    Attributes:
        dense_operators: Full names of the linears left dense for the budget.
        sparse_share: Share of the prunable weights that are pruned.
        predicted: Sum of the prices of the pruned units, nats a token.
        measured: What it really costs, on each text.
    """

    dense_operators: tuple[str, ...]
    sparse_share: float
    predicted: float
    measured: tuple[TextIncrease, ...]

    @property
    def bound(self) -> float:
        """The largest over the texts, margin included, in nats a token."""
        return max(item.bound for item in self.measured)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """Read back what ``dataclasses.asdict`` wrote."""
        return cls(
            dense_operators=tuple(data["dense_operators"]),
            sparse_share=data["sparse_share"],
            predicted=data["predicted"],
            measured=tuple(TextIncrease(**item) for item in data["measured"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReport:
    """What the manifest says under ``report.budget``.

    Attributes:
        goal: What was asked for.
        chosen: The round that was published.
        rounds: All of them, in order.
        sensitivities: The units and their prices, in the order of the model.
        prunable_weights: Theirs together.
        weight_bytes: Size of the published weights on disk.
        dense_bytes: Size of the dense model's parameters in the same dtype.
    """

    goal: Goal
    chosen: Round
    rounds: tuple[Round, ...]
    sensitivities: tuple[UnitSensitivity, ...]
    prunable_weights: int
    weight_bytes: int
    dense_bytes: int
