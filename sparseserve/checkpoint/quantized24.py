"""A 2:4 weight in int8 codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24
from sparseserve.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class Quantized24:
    """A 2:4 weight whose kept values are codes times a scale of their row.

    Attributes:
        codes: int8 values from -127 to 127, and where they lie.
        scale: float32 ``[out]``.
        dtype: What the weight is in when it is not in codes.
    """

    codes: Packed24
    scale: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        values = self.codes.values
        if values.dtype != torch.int8:
            raise ArtifactError(f"int8 codes are stored as {values.dtype}")
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) != (len(values),):
            raise ArtifactError(
                f"codes {tuple(values.shape)} need a float32 scale for each row, "
                f"not {self.scale.dtype} {tuple(self.scale.shape)}"
            )

    def dequantized(self) -> Packed24:
        """Return the weight in its dtype: codes times scales in float32, rounded once."""
        values = self.codes.values.float() * self.scale[:, None]
        return Packed24(values.to(self.dtype), self.codes.indices)
