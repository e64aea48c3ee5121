r"""The layer-wise problem every solver works on.

    minimise over W   1/2 tr(W G W^T) - tr(W B^T)    =    1/2 ||W X* - W0 X||_F^2 + constant

with ``G = X* X*^T + mu I`` and ``B = W0 (X X*^T + mu I)``. Damping both sides by the same ``mu``
pulls the solution towards ``W0``, not towards zero: it adds ``mu/2 ||W - W0||_F^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.errors import NumericalError
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import SparsityPattern


@dataclass(frozen=True, slots=True)
class OperatorProblem:
    """One operator's quadratic, in float32.

    Attributes:
        reference: Dense weight ``W0``, ``[out, in]``.
        gram: Damped ``G``, ``[in, in]``, positive definite.
        target: ``B``, ``[out, in]``.
        pull: ``B - W0 G``, the descent direction at the dense weight; zero without correction.
    """

    reference: Tensor
    gram: Tensor
    target: Tensor
    pull: Tensor

    def loss_rows(self, weight: Tensor) -> Tensor:
        """Return the objective of every row ``[out]``, less its value at the dense weight.

        Written in ``W - W0``, since the three-term form cancels most of its digits.
        """
        change = weight - self.reference
        return (change * (0.5 * (change @ self.gram) - self.pull)).sum(dim=-1)

    def gradient(self, weight: Tensor) -> Tensor:
        """Return ``W G - B``, ``[out, in]``."""
        return torch.addmm(self.target, weight, self.gram, beta=-1)

    def pulled(self, strength: float) -> OperatorProblem:
        """Return the problem with ``strength / 2 ||W - W0||_F^2`` added."""
        gram = self.gram.clone()
        gram.diagonal().add_(strength)
        return OperatorProblem(
            self.reference, gram, self.target + strength * self.reference, self.pull
        )

    def column_scaled(self) -> tuple[OperatorProblem, Tensor]:
        """Return the same problem in ``W diag(s)`` with ``s_j = sqrt(G_jj)``, and ``s`` ``[in]``.

        In these coordinates every input has unit energy, so the plain magnitude of a weight is
        Wanda's score and an l1 penalty shrinks all inputs alike.
        """
        scale = self.gram.diagonal().sqrt()
        return (
            OperatorProblem(
                self.reference * scale,
                self.gram / torch.outer(scale, scale),
                self.target / scale,
                self.pull / scale,
            ),
            scale,
        )


def operator_problem(
    dense_weight: Tensor, statistics: InputStatistics, damping: float
) -> OperatorProblem:
    """Build the problem of ``dense_weight`` ``[out, in]`` from its statistics.

    Args:
        dense_weight: ``W0``.
        statistics: Second moments of its inputs.
        damping: ``mu`` as a share of the mean diagonal of ``G``.

    Raises:
        NumericalError: No input carries any energy, or an entry is not finite.
    """
    reference = finite_weight(dense_weight)
    damped = damped_gram(statistics, damping)
    pull = pull_of(dense_weight, statistics)
    target = reference @ damped
    if pull is None:
        return OperatorProblem(reference, damped, target, torch.zeros_like(reference))
    return OperatorProblem(reference, damped, target + pull, pull)


def finite_weight(weight: Tensor) -> Tensor:
    """Return ``weight`` in float32.

    Raises:
        NumericalError: An entry is not finite.
    """
    reference = weight.float()
    if not bool(torch.isfinite(reference).all()):
        raise NumericalError("the weight has NaN or infinite entries")
    return reference


def damped_gram(statistics: InputStatistics, damping: float) -> Tensor:
    """Return ``G + mu I`` in float32, ``mu`` being a share of the mean diagonal of ``G``.

    Raises:
        NumericalError: No input carries any energy.
    """
    gram = statistics.gram
    mean_energy = float(gram.diagonal().mean())
    if not mean_energy > 0:
        raise NumericalError(
            f"the inputs have mean energy {mean_energy:g} over {statistics.tokens} tokens, "
            "so no error can be measured: use other calibration text"
        )
    damped = gram.float()
    damped = damped.clone() if damped is gram else damped
    damped.diagonal().add_(damping * mean_energy)
    return damped


def pull_of(dense_weight: Tensor, statistics: InputStatistics) -> Tensor | None:
    """Return ``W0 (C - G)`` in float32, by which errors of the inputs pull; None without any."""
    if not statistics.corrected:
        return None
    gram = statistics.gram
    return (dense_weight.to(gram.dtype) @ (statistics.cross - gram)).float()


def better_rows(problem: OperatorProblem, first: Tensor, second: Tensor) -> Tensor:
    """Return, row by row, whichever of two weights has the lower objective (``first`` on ties)."""
    keep = problem.loss_rows(first) <= problem.loss_rows(second)
    return torch.where(keep[:, None], first, second)


def better_candidate(
    problem: OperatorProblem, pattern: SparsityPattern, first: Tensor, second: Tensor
) -> Tensor:
    """Return the better of two weights that obey ``pattern``, as finely as it lets them be mixed.

    That is row by row, or as wholes where the pattern binds rows together. Costs two products
    with the Gram matrix.
    """
    if pattern.rows_are_independent:
        return better_rows(problem, first, second)
    second_is_better = problem.loss_rows(second).sum() < problem.loss_rows(first).sum()
    return second if bool(second_is_better) else first
