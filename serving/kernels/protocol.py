"""The seam between loading a 2:4 weight and multiplying with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import INDICES, Packed24, kept_positions, pack24, unpack24
from sparseserve.errors import ArtifactError, ServingError


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a kernel must know of a layer, on one rank, to say whether it can run it.

    Attributes:
        rows: Output features.
        columns: Input features.
        dtype: Of weight, input and output.
        device: Where the layer runs.
        two_four: Whether every row is 2:4; a merged layer may hold dense modules too.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    two_four: bool


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of a layer, from the module ``name``: packed, or dense ``[rows, in]``."""

    name: str
    weight: Packed24 | Tensor

    def dense(self) -> Tensor:
        """Return the rows as ``[rows, in]``.

        Raises:
            ServingError: The packed form is damaged.
        """
        if isinstance(self.weight, Tensor):
            return self.weight
        with self._naming_damage():
            return unpack24(self.weight)

    def packed(self) -> Packed24:
        """Return the rows packed, checked.

        Raises:
            ServingError: The packed form is damaged, or dense rows are not 2:4.
        """
        if isinstance(self.weight, Packed24):
            with self._naming_damage():
                kept_positions(self.weight)
            return self.weight
        try:
            return pack24(self.weight)
        except ArtifactError as error:
            raise ServingError(f"{self.name}.weight: {error}") from error

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            raise ServingError(
                f"{self.name}.{INDICES}: {error}: check the folder with sparseserve verify"
            ) from error


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """A layer's whole weight on one rank, top to bottom."""

    blocks: tuple[RowBlock, ...]

    def dense(self) -> Tensor:
        """Return ``[rows, columns]`` with zeros in place; one dense block is not copied."""
        rows = [block.dense() for block in self.blocks]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def packed(self) -> Packed24:
        """Return the layer packed as one."""
        parts = [block.packed() for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        return Packed24(
            torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
        )

    def storage_dtype(self) -> torch.dtype:
        """Return the narrowest dtype that holds every value exactly; float32 may hold bfloat16s."""
        return _narrowest(
            [b.weight if isinstance(b.weight, Tensor) else b.weight.values for b in self.blocks]
        )


def _narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    own = tensors[0].dtype
    if own == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            if all(torch.equal(tensor.to(narrow).to(own), tensor) for tensor in tensors):
                return narrow
    return own


class LinearKernel(Protocol):
    """One way to multiply by a 2:4 weight. It has no state: all it needs is in what it packed."""

    @property
    def layout(self) -> str:
        """The name of its packed form. Kernels of one layout pack alike and share one copy."""
        ...

    @property
    def largest_batch(self) -> int | None:
        """The most tokens it takes at once; None for any number."""
        ...

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Return why this kernel cannot run ``spec``, for the user to read, or None if it can."""
        ...

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the plain tensors this kernel multiplies with: all that has to be kept."""
        ...

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return ``inputs @ weight.T + bias``.

        Args:
            packed: What :meth:`pack` returned.
            inputs: ``[batch, columns]``, contiguous, of the layer's dtype.
            bias: ``[rows]`` or None.
            rows: Output features.

        Returns:
            ``[batch, rows]`` of the same dtype.
        """
        ...
