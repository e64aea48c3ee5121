"""The product that runs everything: unpack once, then multiply with the zeros in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """torch's own dense product."""

    layout: ClassVar[str] = "dense"
    largest_batch: ClassVar[int | None] = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Run everything but layers that compute in int8."""
        return spec.float_refusal()

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the weight ``[rows, columns]``."""
        return (weight.dense(),)

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Return the dense product."""
        return linear(inputs, packed[0], bias)
