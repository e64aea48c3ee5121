"""Which operators to prune when not all can be: an exact 0-1 knapsack.

Under an additive model the loss of a pruned model is that of the dense one plus one price for each
pruned unit. Choosing the units with the most weights whose prices stay within a budget is then a
knapsack problem, and choosing the cheapest units with a given number of weights is its converse.
Both are answered by one list: the choices that no other choice beats in weights and price at once
(Nemhauser and Ullmann 1969, "Discrete dynamic programming and capital allocation"). The list
never holds two choices of equal weight, and the operators of a language model come in few shapes,
so it stays short: about a thousand choices for 120 units of four shapes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that is pruned whole or left dense whole.

    Attributes:
        weights: How many weights it has, positive.
        price: By how much pruning it raises the loss, in nats a token. Negative prices, which
            measurements may show by chance, count as zero.
    """

    weights: int
    price: float

    def __post_init__(self) -> None:
        if self.weights < 1 or not math.isfinite(self.price):
            raise ValueError(f"a unit of {self.weights} weights at {self.price} nats")


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice of units to prune.

    Attributes:
        pruned: Their indices, ascending.
        weights: Theirs together.
        price: The rise of the loss that the additive model predicts, in nats a token.
    """

    pruned: tuple[int, ...]
    weights: int
    price: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """A choice as the last unit it takes and the choice it extends."""

    weights: int
    price: float
    unit: int
    extends: _Choice | None


@dataclass(frozen=True, slots=True)
class Frontier:
    """The choices that no other beats, from nothing pruned to everything pruned."""

    _choices: tuple[_Choice, ...]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Frontier:
        """Find the choices for ``units``; of equal choices, one that prunes the earlier units."""
        choices = [_Choice(0, 0.0, -1, None)]
        for index, unit in enumerate(units):
            price = max(unit.price, 0.0)
            extended = [
                _Choice(choice.weights + unit.weights, choice.price + price, index, choice)
                for choice in choices
            ]
            choices = _undominated(sorted((*choices, *extended), key=_order))
        return cls(tuple(choices))

    def within_price(self, budget: float) -> Allocation:
        """Return the choice with the most weights at no more than ``budget`` nats a token."""
        place = bisect.bisect_right(self._choices, budget, key=lambda choice: choice.price)
        if not place:
            raise ValueError(f"budget {budget} is negative")
        return _allocation(self._choices[place - 1])

    def with_weights(self, weights: float) -> Allocation:
        """Return the cheapest choice of at least so many ``weights``."""
        place = bisect.bisect_left(self._choices, weights, key=lambda choice: choice.weights)
        if place == len(self._choices):
            raise ValueError(f"{weights} weights are more than there are")
        return _allocation(self._choices[place])

    def curve(self) -> tuple[tuple[int, float], ...]:
        """Return ``(weights, price)`` of every choice, ascending in both."""
        return tuple((choice.weights, choice.price) for choice in self._choices)


def _order(choice: _Choice) -> tuple[int, float]:
    """Heaviest first, and of equally heavy ones the cheapest first."""
    return -choice.weights, choice.price


def _undominated(choices: Iterable[_Choice]) -> list[_Choice]:
    """Return, lightest first, the ``choices`` that are cheaper than all heavier ones."""
    kept: list[_Choice] = []
    for choice in choices:
        if not kept or choice.price < kept[-1].price:
            kept.append(choice)
    return kept[::-1]


def _allocation(choice: _Choice) -> Allocation:
    pruned = []
    step: _Choice | None = choice
    while step is not None and step.unit >= 0:
        pruned.append(step.unit)
        step = step.extends
    return Allocation(tuple(reversed(pruned)), choice.weights, choice.price)
