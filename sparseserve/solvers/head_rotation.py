r"""Learning a rotation of each head's values, so that pruning them costs less.

A pattern removes the weights whose loss is least. By the optimal brain surgeon, removing ``W_ij``
alone costs ``s_ij = W_ij^2 / [H^-1]_jj``, where ``H`` is the damped second moment of the inputs
(Hassibi and Stork 1993; SparseGPT selects by the same). A rotation ``R`` of a head's values changes
the weights ``V`` that make them and ``O`` that read them, and not what the layer computes::

    V <- R^T V      s^v_ij = (R^T V)_ij^2 / [H_x^-1]_jj
    O <- O R        s^o_ij = (O R)_ij^2   / [R^T H_o^-1 R]_jj

so the sum of the losses of what the pattern removes, each operator's relative to its energy, is
minimised over orthogonal ``R`` by Adam. ``R`` is the orthogonal factor of a free matrix.

Gu et al. 2025, "DenoiseRotator", learns rotations by the entropy of the same scores; Liu et al.
2024, "SpinQuant", merges a rotation of values in this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.solvers.linalg import shifted_inverse
from sparseserve.sparsity import SparsityPattern

_DAMPING = 0.01


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The weights around the values of a layer's attention, and what they read.

    Attributes:
        values: ``[heads, width, in_features]``.
        outputs: ``[out_features, heads, shared_by, width]``.
        value_gram: Second moment of what ``values`` reads, ``[in_features, in_features]``.
        output_gram: That of what ``outputs`` reads, ``[n, n]`` for ``n = heads shared_by width``.
    """

    values: Tensor
    outputs: Tensor
    value_gram: Tensor
    output_gram: Tensor


@dataclass(frozen=True, slots=True)
class LearnedRotations:
    """Orthogonal ``rotations`` ``[heads, width, width]``, and the loss without and with them."""

    rotations: Tensor
    before: float
    after: float


def learn_rotations(
    weights: HeadWeights, pattern: SparsityPattern, *, steps: int = 150, rate: float = 0.02
) -> LearnedRotations:
    """Rotate each head so that ``pattern`` removes less.

    Args:
        weights: In float32; of the dense layer.
        pattern: What will be pruned to.
        steps: Of Adam.
        rate: Of Adam at its highest; it falls to 0 along a cosine.

    Returns:
        The best rotations seen, in float64; never worse than none.

    Raises:
        NumericalError: A second moment is not positive definite even when damped.
    """
    objective = _Objective(weights, pattern)
    heads, width, _ = weights.values.shape
    free = torch.eye(width, device=weights.values.device).repeat(heads, 1, 1)
    best = free.clone()
    before = lowest = float(objective.of(free))
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective.of(torch.linalg.qr(free).Q)
        loss.backward()  # type: ignore[no-untyped-call]
        if float(loss.detach()) < lowest:
            lowest, best = float(loss.detach()), free.detach().clone()
        optimizer.step()
        schedule.step()
    return LearnedRotations(torch.linalg.qr(best.double()).Q, before, lowest)


class _Objective:
    """The share of their energy that the operators lose."""

    def __init__(self, weights: HeadWeights, pattern: SparsityPattern) -> None:
        self._values, self._outputs, self._pattern = weights.values, weights.outputs, pattern
        value_gram, output_gram = _scaled(weights.value_gram), _scaled(weights.output_gram)
        self._value_scores = shifted_inverse(value_gram, _DAMPING).diagonal().reciprocal()
        self._value_energy = _energy(self._values.flatten(0, 1), value_gram)
        self._output_energy = _energy(self._outputs.flatten(1), output_gram)
        inverse = shifted_inverse(output_gram, _DAMPING)
        _, heads, shared_by, width = self._outputs.shape
        blocks = inverse.reshape(heads * shared_by, width, heads * shared_by, width)
        own = torch.arange(heads * shared_by)
        self._output_inverse = blocks[own, :, own].reshape(heads, shared_by, width, width)

    def of(self, rotations: Tensor) -> Tensor:
        """Return the loss, a scalar, under ``rotations`` ``[heads, width, width]``."""
        values = (rotations.mT @ self._values).flatten(0, 1)
        outputs = torch.einsum("nkrh,khg->nkrg", self._outputs, rotations)
        turned = torch.einsum("khg,krhi,kig->krg", rotations, self._output_inverse, rotations)
        scores = outputs.square() / turned
        return (
            self._removed(values.square() * self._value_scores) / self._value_energy
            + self._removed(scores.flatten(1)) / self._output_energy
        )

    def _removed(self, scores: Tensor) -> Tensor:
        return scores[~self._pattern.best_mask(scores.detach())].sum()


def _scaled(gram: Tensor) -> Tensor:
    return (gram / gram.diagonal().mean()).float()


def _energy(weight: Tensor, gram: Tensor) -> Tensor:
    return ((weight @ gram) * weight).sum()
