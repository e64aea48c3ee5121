"""Kernels that multiply by 2:4 weights, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.dense import DenseKernel
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight, RowBlock

__all__ = [
    "KERNELS",
    "KernelChoice",
    "LinearKernel",
    "LinearSpec",
    "LoadedWeight",
    "RowBlock",
    "choose_kernel",
]

# In order of preference; the last one runs everything.
KERNELS: dict[str, Callable[[], LinearKernel]] = {"dense": DenseKernel}


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel of one layer, and why the ones preferred to it were passed over."""

    name: str
    kernel: LinearKernel
    reason: str


def choose_kernel(
    spec: LinearSpec, kernels: dict[str, Callable[[], LinearKernel]] = KERNELS
) -> KernelChoice:
    """Return the first kernel of the table that can run ``spec``.

    Raises:
        ServingError: None can; each one's reason is given.
    """
    refusals: list[str] = []
    for name, make in kernels.items():
        kernel = make()
        refusal = kernel.unsupported(spec)
        if refusal is None:
            return KernelChoice(name, kernel, "; ".join(refusals) or "first choice")
        refusals.append(f"{name}: {refusal}")
    raise ServingError(f"no kernel runs {spec}: {'; '.join(refusals)}")
