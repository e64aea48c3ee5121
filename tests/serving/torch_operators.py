"""cuSPARSELt and CUTLASS without a card.

torch has these operators for CUDA only. Here they get a reference for the CPU, so that our kernels
and torch's own semi-structured classes run the same way they do on a card, but for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparseserve.checkpoint.packed24 import Packed24, pack24, unpack24
from sparseserve.serving.kernels import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cuda.cusparselt import CusparseltKernel
from sparseserve.serving.kernels.cuda.cutlass import CutlassKernel
from sparseserve.sparsity import TWO_FOUR

ON_TORCH: list[CusparseltKernel | CutlassKernel] = [
    CusparseltKernel(),
    CusparseltKernel(1, 3),
    CutlassKernel(),
]


def compress(dense: Tensor) -> Tensor:
    """Values, then positions: of the size of cuSPARSELt's form, in an order of our own."""
    packed = pack24(dense)
    return torch.cat([packed.values.flatten(), packed.indices.flatten().view(dense.dtype)])


def cslt_multiply(  # noqa: PLR0917  # the operator's signature
    compressed: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    # What the operator asks on a card, and does not say.
    assert right.shape[1] % 8 == 0
    assert right.dtype == compressed.dtype
    assert (split_k_mode == 2) == (split_k > 1)
    columns = right.shape[0]
    rows = compressed.numel() * 16 // 9 // columns
    flat = compressed.flatten()
    values, codes = flat[: rows * columns // 2], flat[rows * columns // 2 :]
    packed = Packed24(values.view(rows, -1), codes.view(torch.uint8).view(rows, -1))
    product = unpack24(packed).float() @ right.float()
    if bias is not None:
        product += bias.float()[:, None]
    product = product.to(right.dtype)
    return product.t().contiguous() if transpose_result else product


def cutlass_multiply(
    values: Tensor, metadata: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    assert right.shape[1] % 8 == 0
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return (dense.float() @ right.float()).to(right.dtype)


def cutlass_multiply_add(
    bias: Tensor,
    values: Tensor,
    metadata: Tensor,
    right: Tensor,
    *,
    alpha: float = 1,
    beta: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    assert right.shape[1] % 8 == 0
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return (dense.float() @ right.float() + bias.float()[:, None]).to(right.dtype)


@contextmanager
def operators_on_cpu() -> Iterator[None]:
    """Give torch the operators for as long as a ``with`` block runs."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    impl: Callable[..., None] = library.impl
    impl("_cslt_compress", compress, "CPU")
    impl("_cslt_sparse_mm", cslt_multiply, "CPU")
    impl("_sparse_semi_structured_mm", cutlass_multiply, "CPU")
    impl("_sparse_semi_structured_addmm", cutlass_multiply_add, "CPU")
    yield
    library._destroy()  # type: ignore[no-untyped-call]


def two_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns)).to(dtype)


def spec_of(
    rows: int = 64,
    columns: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    two_four: bool = True,
) -> LinearSpec:
    return LinearSpec(rows, columns, dtype, torch.device("cpu"), two_four)


def pack(kernel: LinearKernel, weight: Tensor) -> tuple[Tensor, ...]:
    return kernel.pack(loaded(weight), spec_of(len(weight), weight.shape[1], weight.dtype))


def loaded(*weights: Tensor | Packed24) -> LoadedWeight:
    return LoadedWeight(tuple(RowBlock(str(i), weight) for i, weight in enumerate(weights)))
