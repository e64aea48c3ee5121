"""Settings of the training of a whole pruned model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparseserve.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """How to retrain.

    Attributes:
        every_weight: Whether all kept weights of the pruned operators are trained, instead of
            low-rank updates of them. Their learning rate is relative to the root mean square of
            the operator's kept weights.
        rank: Of the low-rank updates; 0 for none.
        scale: Factor on the low-rank product (alpha / rank in LoRA's terms).
        norms: Whether the weights of norms are trained.
        biases: Whether biases are trained, those of linears and of norms.
        distillation: Share of the divergence from the dense model in the loss; the rest is the
            cross-entropy of the next token. 0 is PERP.
        likeliest: How many of the dense model's likeliest tokens the divergence tells apart.
        learning_rate: Of AdamW, at its highest.
        warmup: Share of the steps in which it rises from 0; then it falls linearly to 0.
        epochs: Passes over the windows that are not held out; 0 leaves the model as pruned.
        batch: Windows a step.
        clip: Largest norm of a step's gradient.
        held_out: Share of windows not trained on.
        fresh: Windows of the calibration text that pruning does not see, for this training alone;
            0 trains on those that it saw.
        checkpointing: Compute what happens inside decoder layers twice instead of keeping it.
        seed: Draws the first values and the order of windows.
    """

    every_weight: bool = False
    rank: int = 16
    scale: float = 2.0
    norms: bool = True
    biases: bool = True
    distillation: float = 0.0
    likeliest: int = 256
    learning_rate: float = 1e-3
    warmup: float = 0.1
    epochs: int = 0
    batch: int = 1
    clip: float = 1.0
    held_out: float = 0.125
    fresh: int = 0
    checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.epochs) < 0 or min(self.likeliest, self.batch) < 1:
            raise RecipeError(
                "retraining: rank and epochs must not be negative, likeliest and batch at least 1"
            )
        if not min(self.scale, self.learning_rate, self.clip) > 0:
            raise RecipeError("retraining: scale, learning_rate and clip must be positive")
        if not (0 <= self.distillation <= 1 and 0 <= self.warmup < 1 and 0 < self.held_out < 1):
            raise RecipeError(
                "retraining: distillation must be from 0 to 1, warmup from 0 to less than 1, "
                "held_out between 0 and 1"
            )
        if self.fresh < 0 or self.fresh == 1:
            raise RecipeError(
                f"retraining: fresh {self.fresh} must be 0, or at least 2: one is held out"
            )
        if not (self.every_weight or self.rank or self.norms or self.biases):
            raise RecipeError("retraining: nothing to train: set rank, norms or biases")

    def distilling(self, windows: int) -> Retraining:
        """Return these settings, but for distilling the dense model on so many fresh ``windows``.

        All kept weights are trained in one epoch; 0 trains nothing.
        """
        if not windows:
            return replace(self, epochs=0)
        return replace(self, every_weight=True, distillation=1.0, fresh=windows, epochs=1)
