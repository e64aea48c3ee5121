"""Factorisations and spectra of damped Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseserve.errors import NumericalError

_DOUBLE_WIDTH = 8192


def largest_eigenvalue(gram: Tensor, *, iterations: int = 30, margin: float = 1.02) -> float:
    """Bound the largest eigenvalue of a symmetric ``[n, n]`` matrix from power iterations.

    A power iteration approaches the eigenvalue from below, so the result is raised by ``margin``,
    and never exceeds the row-sum bound of Gershgorin.
    """
    vector = gram.diagonal().sqrt() + gram.abs().mean(dim=0)
    estimate = 0.0
    for _ in range(iterations):
        vector = gram @ (vector / vector.norm())
        estimate = float(vector.norm())
    return min(estimate * margin, float(gram.abs().sum(dim=1).max()))


def upper_inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular ``U`` with ``U^T U = G^-1``, in float32.

    ``G`` with its rows and columns in reverse order has a lower factor, which reversed again is an
    upper ``R`` with ``R R^T = G``. So ``U`` is ``R^-1``, and ``G^-1`` is never formed.

    Raises:
        NumericalError: ``G`` is not numerically positive definite; names the remedy.
    """
    # Nothing else is kept by a name: these are the largest matrices that there are.
    factor = _cholesky(
        (gram.double() if len(gram) <= _DOUBLE_WIDTH else gram).flip(0, 1),
    ).flip(0, 1)
    unit = torch.eye(len(gram), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, unit, upper=True)
    return inverse.float()


def shifted_inverse(gram: Tensor, shift: float) -> Tensor:
    """Return ``(G + shift I)^-1``, ``[n, n]``, in the dtype of ``G``.

    It takes ``n^3`` operations, less than an eigendecomposition by an order of magnitude. Single
    precision is enough for a gram of unit diagonal: its rounding is that of a change of ``G`` by
    about ``1e-7 lambda_max(G)``, far below any useful shift.

    Raises:
        NumericalError: ``G + shift I`` is not numerically positive definite; names the remedy.
    """
    return torch.cholesky_inverse(shifted_factor(gram, shift))


def shifted_factor(gram: Tensor, shift: float) -> Tensor:
    """Return the lower triangular ``L`` with ``L L^T = G + shift I``, in the dtype of ``G``.

    A third of the operations of :func:`shifted_inverse`. What it says of precision holds here, too.

    Raises:
        NumericalError: ``G + shift I`` is not numerically positive definite; names the remedy.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    return _cholesky(shifted)


def _cholesky(gram: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        lowest = float(torch.linalg.eigvalsh(gram).min())
        raise NumericalError(
            f"the second moment of {len(gram)} inputs has eigenvalue {lowest:.3g}, not above 0: "
            "raise the recipe's damping or calibrate with more text"
        )
    factor: Tensor = lower
    return factor
