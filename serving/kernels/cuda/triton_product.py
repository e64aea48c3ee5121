"""The device code of the Triton kernels: packed24 tensors are read as they lie on disk.

A program of ``product_kernel`` computes one tile ``[tile rows, tile batch]`` of the transposed
output. It reads values and indices (9/16 of the bytes of a 16-bit dense weight), puts the zeros
back in registers and multiplies on dense tensor cores. What is saved is memory traffic, which is
what bounds small batches. The weight is the left operand: its rows fill the long side of a
tensor-core instruction, and the batch needs only the short one.

A program of ``vector_kernel`` computes a tile of one input's outputs without tensor cores. It picks
the two inputs of each group by their codes, so that no zero is put back or multiplied.

Importing this module imports Triton.
"""

# The bodies of these functions are Triton's language, not Python: their arguments are its
# tensors, and upper case names are constants of the compiled kernel.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(pairs, codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the dense ``[ROWS, COLUMNS]`` tile of a 16-bit weight.

    ``pairs`` ``[ROWS, COLUMNS / 4]`` holds the two values of a group as one uint32, the first in
    its low half; ``codes`` is ``[ROWS, COLUMNS / 8]``. A code 0, which no checkpoint holds, stands
    for what lies beyond the edge; its values are zero.
    """
    halves = tl.reshape(tl.join(codes & 15, codes >> 4), (ROWS, COLUMNS // 4)).to(tl.uint64)
    # A group of four is one 64-bit word, and each value is shifted to its place in it. That takes
    # fewer instructions than choosing by comparison what stands at each place.
    low, high = (pairs & 0xFFFF).to(tl.uint64), (pairs >> 16).to(tl.uint64)
    word = (low << ((halves & 3) * 16)) | (high << ((halves >> 2) * 16))
    # join makes the last axis: [.., a, b] is position 2a + b.
    even = tl.join(word.to(tl.uint16), (word >> 32).to(tl.uint16))
    odd = tl.join((word >> 16).to(tl.uint16), (word >> 48).to(tl.uint16))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS)).to(DTYPE, bitcast=True)


# The batch changes from call to call: compiling anew for every 1 and every multiple of 16 would
# stall a server.
@triton.jit(do_not_specialize=["batch"])
def product_kernel(
    inputs,
    pairs,
    codes,
    bias,
    output,
    batch,
    rows,
    columns,
    pair_stride,
    code_stride,
    split_columns,
    HAS_BIAS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Write a tile of ``inputs @ W.T (+ bias)``, or of one split's float32 share of it.

    Strides are in elements, and given apart from ``columns`` so that Triton sees which are
    multiples of 16 and reads whole vectors. ``split_columns`` is a multiple of ``TILE_COLUMNS``.
    """
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    member = tl.program_id(1) * TILE_BATCH + tl.arange(0, TILE_BATCH)
    split = tl.program_id(2)
    # Long prompts times a wide layer are more than 2**31 elements.
    wide_row, wide_member = row.to(tl.int64), member.to(tl.int64)
    pair_rows = pairs + wide_row[:, None] * pair_stride
    code_rows = codes + wide_row[:, None] * code_stride
    input_columns = inputs + wide_member[None, :] * columns

    total = tl.zeros((TILE_ROWS, TILE_BATCH), dtype=tl.float32)
    start = split * split_columns
    for column in range(start, tl.minimum(start + split_columns, columns), TILE_COLUMNS):
        group = column // 4 + tl.arange(0, TILE_COLUMNS // 4)
        byte = column // 8 + tl.arange(0, TILE_COLUMNS // 8)
        place = column + tl.arange(0, TILE_COLUMNS)
        pair_mask = (row < rows)[:, None] & (group < pair_stride)[None, :]
        code_mask = (row < rows)[:, None] & (byte < code_stride)[None, :]
        input_mask = (member < batch)[None, :] & (place < columns)[:, None]
        pair_tile = tl.load(pair_rows + group[None, :], mask=pair_mask, other=0)
        code_tile = tl.load(code_rows + byte[None, :], mask=code_mask, other=0)
        input_tile = tl.load(input_columns + place[:, None], mask=input_mask, other=0.0)
        weight = decode(
            pair_tile.to(tl.uint32, bitcast=True), code_tile, TILE_ROWS, TILE_COLUMNS, DTYPE
        )
        total = tl.dot(weight, input_tile, total)

    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    mask = (row < rows)[:, None] & (member < batch)[None, :]
    places = wide_member[None, :] * rows + wide_row[:, None]
    if IS_PARTIAL:
        places += split.to(tl.int64) * batch * rows
    tl.store(output + places, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def vector_kernel(
    inputs,
    pairs,
    codes,
    bias,
    output,
    batch,
    rows,
    columns,
    pair_stride,
    code_stride,
    split_columns,
    HAS_BIAS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Do as ``product_kernel`` does with a tile of one input."""
    DTYPE: tl.constexpr = inputs.dtype.element_ty
    GROUPS: tl.constexpr = TILE_COLUMNS // 4
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    member, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    wide_row = row.to(tl.int64)
    pair_rows = pairs + wide_row[:, None] * pair_stride
    code_rows = codes + wide_row[:, None] * code_stride
    # The four inputs of a group are one word too: they change places between threads once.
    input_words = (inputs + member * columns).to(tl.pointer_type(tl.uint64), bitcast=True)

    total = tl.zeros((TILE_ROWS, GROUPS), dtype=tl.float32)
    start = split * split_columns
    for column in range(start, tl.minimum(start + split_columns, columns), TILE_COLUMNS):
        group = column // 4 + tl.arange(0, GROUPS)
        byte = column // 8 + tl.arange(0, GROUPS // 2)
        pair_mask = (row < rows)[:, None] & (group < pair_stride)[None, :]
        code_mask = (row < rows)[:, None] & (byte < code_stride)[None, :]
        pair_tile = tl.load(pair_rows + group[None, :], mask=pair_mask, other=0)
        code_tile = tl.load(code_rows + byte[None, :], mask=code_mask, other=0)
        word = tl.load(input_words + group, mask=group < pair_stride, other=0)[None, :]
        x0 = word.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        x1 = (word >> 16).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        x2 = (word >> 32).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        x3 = (word >> 48).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
        code = tl.reshape(tl.join(code_tile & 15, code_tile >> 4), (TILE_ROWS, GROUPS))
        low, high = code & 3, code >> 2
        # The first place of a group is never its last, the second never its first.
        first = tl.where(low == 0, x0, tl.where(low == 1, x1, x2))
        second = tl.where(high == 3, x3, tl.where(high == 2, x2, x1))
        pair = pair_tile.to(tl.uint32, bitcast=True)
        total += (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32) * first
        total += (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32) * second

    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    place = member * rows + wide_row
    if IS_PARTIAL:
        place += split.to(tl.int64) * batch * rows
    tl.store(output + place, result.to(output.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["size"])
def sum_kernel(
    shares,
    bias,
    output,
    size,
    rows,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the shares ``[SPLITS, size]`` of all splits, always in the same order, and the bias."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < size
    total = tl.load(shares + place, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(shares + split * size + place, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + place % rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def unpack_kernel(
    pairs,
    codes,
    output,
    rows,
    columns,
    pair_stride,
    code_stride,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Write a tile of the dense weight ``[rows, columns]``, zeros in place."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS
    wide_row, inside = row.to(tl.int64)[:, None], (row < rows)[:, None]
    group = column // 4 + tl.arange(0, TILE_COLUMNS // 4)[None, :]
    byte = column // 8 + tl.arange(0, TILE_COLUMNS // 8)[None, :]
    place = column + tl.arange(0, TILE_COLUMNS)[None, :]
    pair_mask, code_mask = inside & (group < pair_stride), inside & (byte < code_stride)
    pair_tile = tl.load(pairs + wide_row * pair_stride + group, mask=pair_mask, other=0)
    code_tile = tl.load(codes + wide_row * code_stride + byte, mask=code_mask, other=0)
    weight = decode(
        pair_tile.to(tl.uint32, bitcast=True),
        code_tile,
        TILE_ROWS,
        TILE_COLUMNS,
        output.dtype.element_ty,
    )
    tl.store(output + wide_row * columns + place, weight, mask=inside & (place < columns))
