"""One run of a kernel before it is trusted, on the device and at the shape it is to serve.

Libraries differ by version and card in which algorithms they have, and a compressed form that one
algorithm wrote another may misread without a word. So a CUDA kernel is offered for a layer only
after it gave the right product at every batch size that is timed, and at a larger one. Weights and
inputs of the trial are small whole numbers: float32 sums of them are exact in any order, and so is
the reference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparseserve.errors import first_line
from sparseserve.serving.kernels.choice.plan import BATCHES
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.sparsity import TWO_FOUR

# More rows only repeat what these show, and the trial should not need much memory.
_MOST_ROWS = 1024
# Rows beyond them that keep what a kernel may have been specialised for: divisibility.
_ROW_DIVISOR = 32
_BIAS_STEP = 256
# Of the timed sizes, and one like a long prompt, which no tile divides.
_BATCHES = (*BATCHES, 2049)


@functools.cache
def trial_refusal(kernel: LinearKernel, spec: LinearSpec) -> str | None:
    """Return why ``kernel`` failed on ``spec``, or None if it gave the right products.

    Each pair is tried once a process. Not to be called while a graph is captured.
    """
    rows = spec.rows if spec.rows <= _MOST_ROWS else _MOST_ROWS + spec.rows % _ROW_DIVISOR
    small = LinearSpec(rows, spec.columns, spec.dtype, spec.device, two_four=True)
    generator = torch.Generator(spec.device).manual_seed(0)
    dense = TWO_FOUR.project(_whole_numbers(small, rows, generator))
    # Larger than the allowed error of any product, so that a bias left out or out of place shows.
    bias = _BIAS_STEP * torch.randint(-3, 4, (rows,), device=spec.device, generator=generator)
    largest = max(batch for batch in _BATCHES if _takes(kernel, batch))
    inputs = _whole_numbers(small, largest, generator)
    exact = inputs.float() @ dense.float().T
    try:
        packed = kernel.pack(LoadedWeight((RowBlock("trial", dense),)), small)
        for batch in (size for size in _BATCHES if _takes(kernel, size)):
            for offset in (None, bias.to(spec.dtype)):
                found = kernel.matmul(packed, inputs[:batch].contiguous(), offset, rows)
                expected = exact[:batch] + (0 if offset is None else offset.float())
                if not _same(found, expected):
                    return f"gives wrong products at batch {batch} on {spec.device}"
    # Whatever the library or the compiler raises, the layer has other kernels to run on.
    except Exception as error:
        return f"fails on {spec.device}: {first_line(error)}"
    return None


def _takes(kernel: LinearKernel, batch: int) -> bool:
    return kernel.largest_batch is None or batch <= kernel.largest_batch


def _whole_numbers(spec: LinearSpec, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, spec.columns)
    numbers = torch.randint(-3, 4, shape, device=spec.device, generator=generator)
    return numbers.to(spec.dtype)


def _same(found: Tensor, exact: Tensor) -> bool:
    """Whether all is right to the rounding of a few partial sums."""
    step = torch.finfo(found.dtype).eps * exact.abs().max()
    return found.shape == exact.shape and bool(((found - exact).abs() <= 2 * step).all())
