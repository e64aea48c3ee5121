"""The seam between loading a 2:4 weight and multiplying with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import INDICES, Packed24, kept_positions, pack24, unpack24
from sparseserve.checkpoint.quantized24 import Quantized24
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
        quantized: ``"int8"`` for a layer that multiplies int8 codes by activations quantized to
            int8, whatever its batch; None for one that multiplies numbers of its dtype.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    two_four: bool
    quantized: str | None = None

    def float_refusal(self) -> str | None:
        """Return why a kernel of floating point cannot run the layer, or None if it may.

        It would compute another function than the kernels for other batches of the layer do.
        """
        return f"the layer computes in {self.quantized}" if self.quantized else None


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of a layer, from the module ``name``.

    Packed, packed in int8 codes, or dense ``[rows, in]``.
    """

    name: str
    weight: Packed24 | Quantized24 | Tensor

    def dense(self) -> Tensor:
        """Return the rows as ``[rows, in]``.

        Raises:
            ServingError: The packed form is damaged.
        """
        if isinstance(self.weight, Tensor):
            return self.weight
        with self._naming_damage():
            return unpack24(_dequantized(self.weight))

    def packed(self) -> Packed24:
        """Return the rows packed, checked.

        Raises:
            ServingError: The packed form is damaged, or dense rows are not 2:4.
        """
        if not isinstance(self.weight, Tensor):
            packed = _dequantized(self.weight)
            with self._naming_damage():
                kept_positions(packed)
            return packed
        try:
            return pack24(self.weight)
        except ArtifactError as error:
            raise ServingError(f"{self.name}.weight: {error}") from error

    def codes(self) -> Quantized24:
        """Return the rows in int8 codes, checked.

        Raises:
            ServingError: The rows are not in codes, or are damaged.
        """
        if not isinstance(self.weight, Quantized24) or not self.weight.is_int8:
            raise ServingError(f"{self.name}: the weight is not int8")
        with self._naming_damage():
            kept_positions(self.weight.codes)
        return self.weight

    def values(self) -> Tensor:
        """Return the values that are stored, in the dtype that products of floats take."""
        if isinstance(self.weight, Tensor):
            return self.weight
        return _dequantized(self.weight).values

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
        return _joined([block.packed() for block in self.blocks])

    def codes(self) -> tuple[Packed24, Tensor]:
        """Return the layer's int8 codes packed as one, and the scale of every row, ``[rows]``.

        Raises:
            ServingError: A module is not in codes, or is damaged.
        """
        parts = [block.codes() for block in self.blocks]
        codes = _joined([part.codes for part in parts])
        return codes, torch.cat([part.scale[:, 0] for part in parts])

    def storage_dtype(self) -> torch.dtype:
        """Return the narrowest dtype that holds every value exactly; float32 may hold bfloat16s."""
        return _narrowest([block.values() for block in self.blocks])


def _dequantized(weight: Packed24 | Quantized24) -> Packed24:
    return weight.dequantized() if isinstance(weight, Quantized24) else weight


def _joined(parts: Sequence[Packed24]) -> Packed24:
    if len(parts) == 1:
        return parts[0]
    return Packed24(
        torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
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
