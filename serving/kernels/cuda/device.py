"""What the CUDA kernels must know of a device before they promise to run on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sparseserve.serving.kernels.protocol import LinearSpec

#: The 2:4 kernels multiply 16-bit weights; sums are float32.
DTYPES = (torch.float16, torch.bfloat16)
#: The first with bfloat16 and with sparse tensor cores.
FIRST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA device.

    Attributes:
        name: As the driver gives it.
        capability: Compute capability, such as (8, 6).
        processors: Streaming multiprocessors.
        cusparselt: Version of the cuSPARSELt that torch was built with, or None without one.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    cusparselt: int | None

    def __str__(self) -> str:
        """Name the device and its compute capability."""
        major, minor = self.capability
        return f"{self.name} (compute capability {major}.{minor})"


def cuda_device(device: torch.device) -> CudaDevice | None:
    """Describe ``device``, or return None if it is not a CUDA device of this machine."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _describe(index)


@functools.cache
def _describe(index: int) -> CudaDevice:
    facts = torch.cuda.get_device_properties(index)
    return CudaDevice(
        name=facts.name,
        capability=(facts.major, facts.minor),
        processors=facts.multi_processor_count,
        cusparselt=torch.backends.cusparselt.version(),
    )


def refusal(
    spec: LinearSpec, device: CudaDevice | None, *, row_multiple: int, column_multiple: int
) -> str | None:
    """Return why no 2:4 kernel of these shape limits can run ``spec`` on ``device``, or None."""
    if device is None or spec.quantized:
        return spec.float_refusal() or f"needs an NVIDIA GPU, the layer is on {spec.device}"
    if device.capability < FIRST_CAPABILITY:
        return f"needs compute capability 8.0 or more, not {device}"
    if not spec.two_four:
        return "a module of the layer is dense"
    if spec.dtype not in DTYPES:
        return f"runs float16 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.rows % row_multiple or spec.columns % column_multiple:
        return (
            f"needs output features in multiples of {row_multiple} and input features in "
            f"multiples of {column_multiple}, not {spec.rows} x {spec.columns}"
        )
    return None
