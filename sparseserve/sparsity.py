"""Sparsity patterns: which weights may stay, and whether a tensor obeys.

This module owns the idea of a pattern. A weight is ``[out_features, in_features]``; groups run
along ``in_features``, the axis a matrix product sums over, because that is the axis on which
sparse tensor cores skip zeros (NVIDIA Ampere architecture whitepaper, "2:4 structured sparsity").
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.paths import shown


@dataclass(frozen=True, slots=True)
class Violation:
    """The first place where a tensor breaks a pattern."""

    row: int
    column: int
    found: int
    allowed: int

    def __str__(self) -> str:
        """Say where and by how much."""
        return (
            f"row {self.row}, columns from {self.column}: {self.found} non-zeros, "
            f"at most {self.allowed} allowed"
        )


class SparsityPattern(ABC):
    """A constraint on the places of the non-zeros of a ``[out, in]`` weight."""

    @staticmethod
    def parse(text: str) -> SparsityPattern:
        """Read ``"2:4"`` (keep 2 of every 4) or ``"50%"`` (zero half of the matrix).

        Raises:
            RecipeError: ``text`` is neither, or its numbers are out of range.
        """
        if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text.strip()):
            return NMPattern(keep=int(match[1]), group=int(match[2]))
        if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,99})?)%", text.strip()):
            return UnstructuredPattern(sparsity=float(f"{match[1]}e-2"))
        raise RecipeError(
            f"pattern {shown(text)} is not N:M (such as 2:4) or a percentage (such as 50%)"
        )

    @property
    @abstractmethod
    def density(self) -> float:
        """Share of weights that may stay, in (0, 1)."""

    @property
    @abstractmethod
    def column_multiple(self) -> int:
        """``in_features`` must be a multiple of this."""

    @property
    @abstractmethod
    def selection_columns(self) -> int | None:
        """Width of the column blocks a left-to-right sweep selects in; None for any width."""

    @property
    @abstractmethod
    def rows_are_independent(self) -> bool:
        """Whether rows taken from several valid tensors make a valid tensor."""

    @property
    def per_row(self) -> SparsityPattern:
        """A pattern that implies this one and binds every row alone."""
        return self

    @abstractmethod
    def best_mask(self, scores: Tensor) -> Tensor:
        """Return the boolean mask ``[out, in]`` that keeps the largest sum of ``scores``.

        Ties go to the lower column, so the result does not depend on the machine.
        """

    @abstractmethod
    def first_violation(self, weight: Tensor) -> Violation | None:
        """Return the first place where ``weight`` has too many non-zeros, or None.

        Raises:
            ArtifactError: ``weight`` is no matrix.
        """

    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest tensor to ``weight``, in the Frobenius norm, that obeys."""
        return weight.where(self.best_mask(weight.abs()), 0)


@dataclass(frozen=True, slots=True)
class NMPattern(SparsityPattern):
    """At most ``keep`` non-zeros in every ``group`` consecutive inputs."""

    keep: int = 2
    group: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.group:
            raise RecipeError(f"pattern {self}: N must be at least 1 and less than M")

    def __str__(self) -> str:
        """Write the pattern as ``parse`` reads it."""
        return f"{self.keep}:{self.group}"

    @property
    def density(self) -> float:
        """Share of weights that may stay."""
        return self.keep / self.group

    @property
    def column_multiple(self) -> int:
        """Groups may not be cut."""
        return self.group

    @property
    def selection_columns(self) -> int:
        """One group at a time."""
        return self.group

    @property
    def rows_are_independent(self) -> bool:
        """Groups never cross rows."""
        return True

    def _groups(self, weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        if columns % self.group:
            raise RecipeError(f"{columns} input features are not a multiple of {self.group}")
        return weight.reshape(rows, columns // self.group, self.group)

    def nonzeros(self, weight: Tensor) -> Tensor:
        """Return how many weights of each group are not zero, ``[rows, groups]``."""
        _require_matrix(weight)
        return (self._groups(weight) != 0).sum(dim=-1)

    def best_mask(self, scores: Tensor) -> Tensor:
        """Keep the ``keep`` largest scores of each group."""
        # Comparing every pair of places is several times faster than sorting such short rows.
        places = self._groups(scores).unbind(dim=-1)
        beaten_by = [torch.zeros_like(place, dtype=torch.int16) for place in places]
        for lower, upper in itertools.combinations(range(self.group), 2):
            lower_wins = places[lower] >= places[upper]
            beaten_by[upper] += lower_wins
            beaten_by[lower] += ~lower_wins
        kept = [count < self.keep for count in beaten_by]
        return torch.stack(kept, dim=-1).reshape(scores.shape)

    def first_violation(self, weight: Tensor) -> Violation | None:
        """Find the first group with more than ``keep`` non-zeros, in row-major order."""
        counts = self.nonzeros(weight)
        flat = (counts > self.keep).flatten()
        if not bool(flat.any()):
            return None
        row, group = divmod(int(flat.to(torch.uint8).argmax()), counts.shape[1])
        return Violation(row, group * self.group, int(counts[row, group]), self.keep)


@dataclass(frozen=True, slots=True)
class UnstructuredPattern(SparsityPattern):
    """A share ``sparsity`` of zeros, anywhere in each row or anywhere in the matrix."""

    sparsity: float
    scope: Literal["row", "matrix"] = "matrix"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise RecipeError(
                f"sparsity {self.sparsity * 100:g}% must lie strictly between 0% and 100%"
            )

    def __str__(self) -> str:
        """Write the pattern as ``parse`` reads it, to the last bit: ``verify`` counts by it."""
        # Only the decimal point moves, which rounds nothing.
        return f"{Decimal(repr(float(self.sparsity))).scaleb(2):f}%"

    @property
    def density(self) -> float:
        """Share of weights that may stay."""
        return 1 - self.sparsity

    @property
    def column_multiple(self) -> int:
        """Any width will do."""
        return 1

    @property
    def selection_columns(self) -> None:
        """Any block width will do."""
        return None

    @property
    def rows_are_independent(self) -> bool:
        """A budget for the whole matrix ties the rows together."""
        return self.scope == "row"

    @property
    def per_row(self) -> SparsityPattern:
        """The same share in every row, hence in the matrix."""
        return UnstructuredPattern(self.sparsity, scope="row")

    def kept(self, count: int) -> int:
        """Return how many of ``count`` weights may stay."""
        # The margin undoes the rounding of a share such as 0.7; flooring keeps a tensor that is
        # pruned block by block within the budget of the whole.
        return math.floor(count * self.density + 1e-9 * count)

    def best_mask(self, scores: Tensor) -> Tensor:
        """Keep the largest scores of each row, or of the matrix."""
        table = scores if self.scope == "row" else scores.reshape(1, -1)
        width = table.shape[1]
        if not (kept := self.kept(width)):
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = table.kthvalue(width - kept + 1, dim=-1, keepdim=True).values
        above, tied = table > threshold, table == threshold
        places_left = kept - above.sum(dim=-1, keepdim=True)
        mask = above | (tied & (tied.cumsum(dim=-1) <= places_left))
        return mask.reshape(scores.shape)

    def first_violation(self, weight: Tensor) -> Violation | None:
        """Find the first row (or the matrix) with too many non-zeros."""
        _require_matrix(weight)
        table = weight if self.scope == "row" else weight.reshape(1, -1)
        counts = (table != 0).sum(dim=-1)
        allowed = self.kept(table.shape[1])
        flat = counts > allowed
        if not bool(flat.any()):
            return None
        row = int(flat.to(torch.uint8).argmax())
        return Violation(row, 0, int(counts[row]), allowed)


TWO_FOUR = NMPattern(keep=2, group=4)


def _require_matrix(weight: Tensor) -> None:
    """Refuse what a damaged checkpoint may hold in the place of a weight."""
    if weight.dim() != 2:
        raise ArtifactError(f"a weight of shape {tuple(weight.shape)} is no matrix")


# Sizes of groups that hardware or papers use.
_GROUPS = (2, 4, 8, 16, 32)
# Fewer zeros than this are chance.
_FEW_ZEROS = 0.05


def strictest_pattern(weight: Tensor) -> tuple[str, int | None]:
    """Return the strictest pattern that a matrix obeys, and the axis along which its groups lie.

    Returns:
        ``N:M`` and 0 or 1 (1 first where both hold), or a share of zeros anywhere, ``dense`` or
        ``zero``, and None.
    """
    _require_matrix(weight)
    zeros = float((weight == 0).float().mean()) if weight.numel() else 0.0
    if zeros == 1:
        return "zero", None
    if not weight.numel():
        return "dense", None
    found: list[tuple[float, int, int, int]] = []
    for axis, turned in ((1, weight), (0, weight.T)):
        for group in (size for size in _GROUPS if turned.shape[1] % size == 0):
            keep = int(NMPattern(1, group).nonzeros(turned).max())
            if keep < group:
                found.append((keep / group, -axis, group, keep))
    if found:
        _, axis, group, keep = min(found)
        return f"{keep}:{group}", -axis
    return (f"{zeros:.0%} unstructured" if zeros >= _FEW_ZEROS else "dense"), None
