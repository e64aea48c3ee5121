"""Layer problems with known answers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparseserve.solvers.statistics import InputStatistics


@dataclass(frozen=True)
class Case:
    """A dense weight and the activations behind its statistics, all float32."""

    weight: Tensor
    pruned_inputs: Tensor
    dense_inputs: Tensor
    statistics: InputStatistics

    def error(self, weight: Tensor) -> float:
        """``||W X* - W0 X||_F^2`` straight from the activations."""
        drift = self.pruned_inputs @ weight.T - self.dense_inputs @ self.weight.T
        return float(drift.double().square().sum())


class CaseFactory:
    """Builds seeded cases with correlated inputs of unequal energy."""

    def __call__(
        self,
        *,
        rows: int = 12,
        columns: int = 16,
        tokens: int = 200,
        corrected: bool = False,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        mixing = normal(columns, columns) * torch.logspace(-0.7, 0.7, columns)
        dense = normal(tokens, columns) @ mixing
        pruned = dense + 0.2 * normal(tokens, columns) @ mixing if corrected else dense
        statistics = InputStatistics.of(pruned, dense if corrected else None)
        return Case(normal(rows, columns), pruned, dense, statistics)


@pytest.fixture
def make_case() -> CaseFactory:
    return CaseFactory()
