"""Launches of the Triton kernels on plain tensors.

Nothing here waits for the device or reads from it, and every allocation has a size that follows
from the shapes: a CUDA graph may capture all of it, once each kernel has been compiled by a first
run. Importing this module imports Triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparseserve.serving.kernels.cuda.tiling import Tiling
from sparseserve.serving.kernels.cuda.triton_product import (
    product_kernel,
    sum_kernel,
    unpack_kernel,
    vector_kernel,
)

SUM_TILE = 1024
UNPACK_TILE = (32, 256)


def multiply(
    values: Tensor, indices: Tensor, inputs: Tensor, bias: Tensor | None, tiling: Tiling
) -> Tensor:
    """Return ``inputs @ W.T + bias`` for a packed24 ``W``.

    Args:
        values: 16-bit ``[rows, columns / 2]``, contiguous.
        indices: uint8 ``[rows, ceil(columns / 8)]``, contiguous.
        inputs: ``[batch, columns]`` of the same dtype, contiguous.
        bias: ``[rows]`` of the same dtype, or None.
        tiling: How to cut the product.
    """
    (batch, columns), rows = inputs.shape, values.shape[0]
    output = inputs.new_empty(batch, rows)
    if batch == 0:
        return output
    split_columns = triton.cdiv(columns, tiling.splits * tiling.columns) * tiling.columns
    splits = triton.cdiv(columns, split_columns)
    target, product_bias = output, bias
    if splits > 1:
        target, product_bias = inputs.new_empty(splits, batch, rows, dtype=torch.float32), None
    grid = (triton.cdiv(rows, tiling.rows), triton.cdiv(batch, tiling.batch), splits)
    kernel, sides = product_kernel, {"TILE_BATCH": tiling.batch}
    if tiling.batch == 1:
        kernel, sides = vector_kernel, {}
        if inputs.storage_offset() % 4:
            inputs = inputs.clone()  # it reads words of four
    kernel[grid](
        inputs,
        values.view(torch.int32),
        indices,
        inputs if product_bias is None else product_bias,
        target,
        batch,
        rows,
        columns,
        columns // 4,
        indices.shape[1],
        split_columns,
        HAS_BIAS=product_bias is not None,
        IS_PARTIAL=splits > 1,
        **sides,
        TILE_ROWS=tiling.rows,
        TILE_COLUMNS=tiling.columns,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _add_shares(target, bias, output)
    return output


def unpack(values: Tensor, indices: Tensor) -> Tensor:
    """Return the dense ``[rows, columns]`` weight of packed24 tensors, on their device."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(rows, columns)
    tile_rows, tile_columns = UNPACK_TILE
    unpack_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
        values.view(torch.int32),
        indices,
        dense,
        rows,
        columns,
        columns // 4,
        indices.shape[1],
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
    )
    return dense


def _add_shares(shares: Tensor, bias: Tensor | None, output: Tensor) -> None:
    size = output.numel()
    sum_kernel[(triton.cdiv(size, SUM_TILE),)](
        shares,
        output if bias is None else bias,
        output,
        size,
        output.shape[1],
        HAS_BIAS=bias is not None,
        SPLITS=shares.shape[0],
        TILE=SUM_TILE,
    )
