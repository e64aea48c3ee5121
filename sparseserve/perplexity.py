"""Perplexity as a value, whichever engine measured it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparseserve.errors import NumericalError


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Perplexity over ``tokens`` predicted tokens."""

    perplexity: float
    tokens: int

    @classmethod
    def from_negative_log_likelihood(cls, total: float, tokens: int) -> PerplexityResult:
        """Return exp(``total`` / ``tokens``), ``total`` being in nats.

        Raises:
            NumericalError: ``total`` is not finite, or the perplexity is too large for a float.
        """
        if tokens < 1:
            raise ValueError("perplexity of no tokens")
        mean = total / tokens
        if not math.isfinite(mean) or mean > math.log(1e300):
            raise NumericalError(
                f"mean negative log-likelihood is {mean}, so there is no perplexity: "
                "the model's weights or activations are not finite or overflow"
            )
        return cls(math.exp(mean), tokens)
