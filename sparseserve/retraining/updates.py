"""Trainable updates of a pruned model: vectors, low-rank products under the mask, kept weights.

Every update is added to a frozen weight while the model runs and can be merged into it afterwards,
so the merged model has the parameters, the shapes and the zeros it had before. The master values
of an update are float32 whatever the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseserve.huggingface.experts import routers_in
from sparseserve.models.layer_list import is_linear


class Shift(nn.Module):
    """A vector plus a trainable one."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(vector, dtype=torch.float32))

    def forward(self, vector: Tensor) -> Tensor:
        """Return the shifted vector in its own dtype."""
        return (vector.float() + self.shift).to(vector.dtype)


class MaskedLowRank(nn.Module):
    """``W + mask * scale * (left @ right)``, the MaskLoRA of PERP (Zimmer et al. 2023).

    Gradients reach the factors through kept weights only. The weight is taken as it is stored,
    ``[out, in]`` or the transpose.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        """Start at no change: ``left`` is zero, ``right`` is random."""
        super().__init__()
        rows, columns = weight.shape
        self.scale = scale
        self.left = nn.Parameter(weight.new_zeros(rows, rank, dtype=torch.float32))
        right = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.right = nn.Parameter(right.to(weight.device))
        self.mask: Tensor
        self.register_buffer("mask", weight != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight in its own dtype; what was zero is zero."""
        product = (self.scale * self.left) @ self.right
        return torch.addcmul(weight.float(), self.mask, product).to(weight.dtype)


class KeptWeights(nn.Module):
    """``W + mask * size * change``: every weight that is not zero may change.

    ``size`` is the root mean square of those weights, so one learning rate fits all operators.
    """

    def __init__(self, weight: Tensor) -> None:
        """Start at no change."""
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        kept = weight != 0
        self.size = float(weight.float().square().sum().div(kept.sum().clamp_min(1)).sqrt())
        self.mask: Tensor
        self.register_buffer("mask", kept, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight in its own dtype; what was zero is zero."""
        updated = torch.addcmul(weight.float(), self.mask, self.change, value=self.size)
        return updated.to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Update:
    """One update in its place: parameter ``name`` of ``module``."""

    module: nn.Module
    name: str
    change: Shift | MaskedLowRank | KeptWeights

    @property
    def parameter(self) -> nn.Parameter:
        """The frozen parameter, while the update is not installed."""
        return self.module.get_parameter(self.name)

    def merged(self) -> Tensor:
        """Return the updated values, with +0.0 for every zero, while it is not installed."""
        with torch.no_grad():
            updated: Tensor = self.change(self.parameter)
        return updated + 0.0


@contextmanager
def installed(updates: list[Update]) -> Iterator[None]:
    """Add ``updates`` to what the model computes while the block runs.

    Afterwards the model has its own, unchanged parameters again.
    """
    placed: list[Update] = []
    try:
        for update in updates:
            # The check would run every update once more; shapes and dtypes are kept by design.
            parametrize.register_parametrization(
                update.module, update.name, update.change, unsafe=True
            )
            placed.append(update)
        yield
    finally:
        for update in placed:
            parametrize.remove_parametrizations(
                update.module, update.name, leave_parametrized=False
            )


def vector_updates(model: nn.Module, *, norms: bool, biases: bool) -> list[Update]:
    """Return updates of all norm weights and of all biases (of norms as well as of linears).

    Routers are left alone: the experts were pruned on the tokens that they send.
    """
    routers = routers_in(model)
    return [
        Update(module, name, Shift(parameter))
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1
        and module_name not in routers
        and ((norms and _is_norm(module, name)) or (biases and name == "bias"))
    ]


def low_rank_updates(
    model: nn.Module, operators: Collection[str], *, rank: int, scale: float, seed: int
) -> list[Update]:
    """Return an update of each of the pruned ``operators``, full module names.

    Raises:
        ValueError: A name is not a linear operator of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(module, "weight", MaskedLowRank(weight, rank, scale, generator))
        for module, weight in _weights(model, operators)
    ]


def kept_updates(model: nn.Module, operators: Collection[str]) -> list[Update]:
    """Return an update of all kept weights of the pruned ``operators``, full module names.

    Raises:
        ValueError: A name is not a linear operator of the model.
    """
    return [
        Update(module, "weight", KeptWeights(weight))
        for module, weight in _weights(model, operators)
    ]


def _weights(
    model: nn.Module, operators: Collection[str]
) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    for name in operators:
        module = model.get_submodule(name)
        if not is_linear(module):
            raise ValueError(f"{name} is not a linear operator")
        yield module, module.get_parameter("weight")


def _is_norm(module: nn.Module, name: str) -> bool:
    return name == "weight" and "norm" in type(module).__name__.lower()
