"""Second moments of an operator's inputs: all that pruning needs to know of the calibration data.

For a linear operator with dense weight ``W0``, inputs ``X`` seen by the dense network and ``X*``
seen by the pruned one (both ``[in, tokens]``), every objective here is a function of

    gram       G = X* X*^T        cross      C = X X*^T        dense_gram   D = X X^T

so no tensor with a token dimension outlives its batch, and memory does not grow with the
calibration set. The sums run over tokens and are not normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.errors import NumericalError

# Up to this width the sums are kept in float64, which makes them independent of the batching to
# the last digits of float32; beyond it the memory would hurt more than the digits help.
_DOUBLE_WIDTH = 8192
# Columns of a second moment that are computed at once: its other triangle comes for nothing.
_BLOCK = 512
# Rows of a weight whose errors are computed at once.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """The three second moments ``[in, in]`` of one input tensor, summed over ``tokens``.

    Without error correction the pruned inputs are the dense ones and the three are one tensor.
    """

    gram: Tensor
    cross: Tensor
    dense_gram: Tensor
    tokens: int

    @classmethod
    def of(cls, pruned_inputs: Tensor, dense_inputs: Tensor | None = None) -> InputStatistics:
        """Return the statistics of ``[tokens, in]`` activations that are all at hand.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
        total = StatisticsSum(
            pruned_inputs.shape[-1],
            corrected=dense_inputs is not None,
            device=pruned_inputs.device,
        )
        total.add(pruned_inputs, dense_inputs)
        return total.finish()

    @property
    def corrected(self) -> bool:
        """Whether dense and pruned inputs are told apart."""
        return self.cross is not self.gram

    def mixed(self, weight: float) -> InputStatistics:
        """Return the statistics whose dense inputs are ``weight X + (1 - weight) X*``.

        With ``weight`` 1 the target ``W0 X`` stays as it is; with 0 it becomes ``W0 X*``, and no
        error of the inputs is repaired.
        """
        if not self.corrected or weight == 1:
            return self
        rest = 1 - weight
        drift = weight * rest * (self.cross + self.cross.T)
        return InputStatistics(
            self.gram,
            weight * self.cross + rest * self.gram,
            weight**2 * self.dense_gram + drift + rest**2 * self.gram,
            self.tokens,
        )

    def filled(self, other: InputStatistics | None, tokens: int) -> InputStatistics:
        """Return these statistics filled up to the energy of ``tokens`` tokens.

        Fewer tokens than features leave directions about which nothing is known. The mean token of
        ``other`` stands for each token that is missing; without ``other``, each feature keeps its
        own mean energy and none goes with any other.
        """
        missing = tokens - self.tokens
        if missing <= 0:
            return self

        def fill(own: Tensor, others: Tensor | None) -> Tensor:
            if other is None or others is None:
                return own + torch.diag(own.diagonal() * (missing / self.tokens))
            return own + others * (missing / other.tokens)

        gram = fill(self.gram, other.gram if other else None)
        if not self.corrected:
            return InputStatistics(gram, gram, gram, self.tokens)
        return InputStatistics(
            gram,
            fill(self.cross, other.cross if other else None),
            fill(self.dense_gram, other.dense_gram if other else None),
            self.tokens,
        )


class StatisticsSum:
    """A sum of second moments that grows batch by batch."""

    def __init__(self, in_features: int, *, corrected: bool, device: torch.device) -> None:
        """Begin with no tokens; ``corrected`` keeps ``X`` and ``X*`` apart."""
        dtype = _sum_dtype(in_features)

        def zeros() -> Tensor:
            return torch.zeros(in_features, in_features, dtype=dtype, device=device)

        self._gram = zeros()
        self._cross = zeros() if corrected else None
        self._dense_gram = zeros() if corrected else None
        self._tokens = 0

    def add(self, pruned_inputs: Tensor, dense_inputs: Tensor | None = None) -> None:
        """Add ``[tokens, in]`` activations.

        Args:
            pruned_inputs: Inputs that the pruned operator sees; left untouched.
            dense_inputs: The same tokens in the dense network; exactly when ``corrected``.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
        if (dense_inputs is not None) != (self._cross is not None):
            raise ValueError("dense_inputs go with corrected statistics, and only with them")
        x = _checked(pruned_inputs)
        _add_gram(self._gram, x)
        if dense_inputs is not None and self._cross is not None and self._dense_gram is not None:
            dense = _checked(dense_inputs)
            self._cross.add_(dense.T @ x)
            _add_gram(self._dense_gram, dense)
        self._tokens += len(x)

    def finish(self) -> InputStatistics:
        """Return the sums themselves, not copies: nothing may be added after this."""
        gram = self._gram
        if self._cross is None or self._dense_gram is None:
            return InputStatistics(gram, gram, gram, self._tokens)
        return InputStatistics(gram, self._cross, self._dense_gram, self._tokens)


def moment_bytes(in_features: int) -> int:
    """Return what one second moment of an input takes while it is summed."""
    return in_features**2 * _sum_dtype(in_features).itemsize


def output_error(weight: Tensor, dense_weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return ``||W X* - W0 X||^2`` of every row, ``[out]`` in float64.

    With ``E = W - W0`` and ``S = X* - X`` it is ``||E X* + W0 S||^2``, expanded so that without
    error correction nothing cancels; single precision is then enough for the products.
    """
    pairs = zip(torch.split(weight, _ROWS), torch.split(dense_weight, _ROWS), strict=True)
    if not statistics.corrected:
        gram = statistics.gram.float()
        changes = (pruned.float() - dense.float() for pruned, dense in pairs)
        return torch.cat([_energies(change, gram) for change in changes])
    gram, cross = statistics.gram.double(), statistics.cross.double()
    pull, drift = gram - cross.T, gram - cross - cross.T + statistics.dense_gram.double()

    def of_rows(pruned: Tensor, before: Tensor) -> Tensor:
        dense = before.double()
        change = pruned.double() - dense
        crossed = 2 * ((change @ pull) * dense).sum(dim=-1)
        return (_energies(change, gram) + crossed + _energies(dense, drift)).clamp_min(0)

    return torch.cat([of_rows(*pair) for pair in pairs])


def output_energy(dense_weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return ``||W0 X||^2`` of every row, ``[out]`` in float64."""
    gram = statistics.dense_gram.float()
    return torch.cat([_energies(rows.float(), gram) for rows in torch.split(dense_weight, _ROWS)])


def relative_output_error(
    weight: Tensor, dense_weight: Tensor, statistics: InputStatistics
) -> float:
    """Return ``||W X* - W0 X||_F / ||W0 X||_F``."""
    energy = output_energy(dense_weight, statistics).sum()
    error = output_error(weight, dense_weight, statistics).sum()
    return float((error / energy).sqrt()) if energy > 0 else float(error.sqrt())


def _sum_dtype(in_features: int) -> torch.dtype:
    return torch.float64 if in_features <= _DOUBLE_WIDTH else torch.float32


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """Add ``x^T x`` to a symmetric ``gram``."""
    for start in range(0, len(gram), _BLOCK):
        stop = start + _BLOCK
        part = x[:, start:stop].T @ x[:, start:]
        gram[start:stop, start:] += part
        gram[stop:, start:stop] += part[:, _BLOCK:].T


def _checked(inputs: Tensor) -> Tensor:
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    if not bool(torch.isfinite(x.sum())):
        raise NumericalError("activations are NaN or infinite")
    return x


def _energies(rows: Tensor, gram: Tensor) -> Tensor:
    """Return ``r G r^T`` of every row, in float64; products are in the dtype of the arguments."""
    return ((rows @ gram) * rows).sum(dim=-1, dtype=torch.float64).clamp_min(0)
