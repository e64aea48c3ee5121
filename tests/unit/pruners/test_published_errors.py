"""On a real operator the methods land on the errors of their authors' own implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from sparseserve.pruners.fista import Fista
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.solvers.statistics import InputStatistics, relative_output_error
from sparseserve.sparsity import TWO_FOUR, SparsityPattern, UnstructuredPattern

OPERATOR = Path(__file__).parents[2] / "data" / "operator.safetensors"


@pytest.fixture(scope="module")
def operator() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(OPERATOR)
    return tensors


class TestOnARealOperator:
    """The figures are those of the authors' own implementations on the same operator."""

    @staticmethod
    def relative_error(
        pruner: Any, operator: dict[str, Tensor], pattern: SparsityPattern
    ) -> tuple[Tensor, float]:
        gram = operator["gram"].double()
        statistics = InputStatistics(gram, gram, gram, 64 * 512)
        weight = pruner.prune(operator["weight"], statistics, pattern).weight
        return weight, relative_output_error(weight, operator["weight"], statistics)

    def test_wanda_lands_on_the_published_error(self, operator: dict[str, Tensor]) -> None:
        _, error = self.relative_error(Wanda(), operator, TWO_FOUR)
        assert error == pytest.approx(0.2485, rel=0.001)

    def test_sparsegpt_lands_on_its_authors_error_and_mask(
        self, operator: dict[str, Tensor]
    ) -> None:
        weight, error = self.relative_error(SparseGPT(), operator, TWO_FOUR)
        assert error == pytest.approx(0.1572, rel=0.002)
        agreement = ((weight != 0) == operator["sparsegpt_mask"].bool()).float().mean()
        assert float(agreement) > 0.999

    def test_unstructured_sparsegpt_lands_on_its_authors_error(
        self, operator: dict[str, Tensor]
    ) -> None:
        _, error = self.relative_error(SparseGPT(), operator, UnstructuredPattern(0.5))
        assert error == pytest.approx(0.0997, rel=0.002)

    def test_fista_beats_sparsegpt_by_a_seventh(self, operator: dict[str, Tensor]) -> None:
        _, error = self.relative_error(Fista(), operator, TWO_FOUR)
        assert error < 0.1572 * 6 / 7
