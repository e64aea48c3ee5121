"""Settings of the steps of pruning that a recipe turns on, without the machinery behind them."""

from __future__ import annotations

from dataclasses import dataclass

from sparseserve.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How to reconstruct a layer.

    Attributes:
        epochs: Passes over the windows; 0 leaves the layer as it was pruned.
        learning_rate: Of Adam, at its highest, relative to the root mean square of each tensor. An
            epoch that leaves the layer worse than it was pruned is undone, and those after it have
            a third of the rate.
        batch: Windows a step.
        held_out: Share of the windows that are not trained on and decide; at least one window.
    """

    epochs: int = 3
    learning_rate: float = 0.01
    batch: int = 1
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or not self.learning_rate > 0:
            raise RecipeError(
                f"reconstruction: epochs {self.epochs} must not be negative, batch {self.batch} "
                f"and learning_rate {self.learning_rate} must be positive"
            )
        if not 0 < self.held_out < 1:
            raise RecipeError(f"reconstruction: held_out {self.held_out} must be between 0 and 1")
