"""The packed form that int8 products read, and the same product in plain torch.

A panel is 32 rows, a sequence of blocks of 8 columns: two groups of four. Of each row a block keeps
four codes. Its 160 bytes are first 32 of places, then the codes in four strips of 8 rows, row after
row. The place of a code in its group takes two bits: those of the four codes that lie at the same
byte of their strips share a byte, the first strip in the lowest bits. That is 5 bits for a dense
weight. A vector unit makes the places of a whole strip with one shift.

Rows and columns are filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseserve.checkpoint.packed24 import Packed24, kept_positions, unpack24
from sparseserve.checkpoint.quantization import INT8, Quantization, codes_of, scales_of

INT8_PANEL_ROWS = 32
INT8_BLOCK_COLUMNS = 8
INT8_BLOCK_BYTES = 160

_STRIPS = 4
_STRIP_ROWS = INT8_PANEL_ROWS // _STRIPS
_KEPT = INT8_BLOCK_COLUMNS // 2
_INT8 = Quantization(to=INT8)


def int8_panels(codes: Packed24) -> Tensor:
    """Return the panels of a 2:4 weight of int8 codes, uint8 ``[panels, blocks, 160]``.

    Args:
        codes: The weight ``[rows, columns]``.

    Raises:
        ArtifactError: The positions of a group do not ascend, or padding bits are set.
        ValueError: A code is -128, which there is not.
    """
    if codes.values.dtype != torch.int8 or bool((codes.values < -_INT8.largest).any()):
        raise ValueError(f"codes: {codes.values.dtype} beyond +-{_INT8.largest}")
    rows, kept = codes.values.shape
    places = kept_positions(codes).reshape(rows, kept)
    extra = (0, -kept % _KEPT, 0, -rows % INT8_PANEL_ROWS)
    strips = [
        # panels, strips, rows, blocks, codes: to panels, blocks, strips, bytes
        pad(tensor, extra)
        .reshape(-1, _STRIPS, _STRIP_ROWS, -(-kept // _KEPT), _KEPT)
        .permute(0, 3, 1, 2, 4)
        .flatten(-2)
        for tensor in (codes.values.view(torch.uint8), places)
    ]
    shared = strips[1][:, :, 0]
    for strip in range(1, _STRIPS):
        shared = shared | strips[1][:, :, strip] << 2 * strip
    return torch.cat((shared, strips[0].flatten(-2)), dim=-1)


def quantized_tokens(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token symmetrically by its largest value.

    Args:
        inputs: ``[batch, columns]``, floating point.

    Returns:
        Whole numbers from -127 to 127, float32 ``[batch, columns]``, and the scale of each token,
        float32 ``[batch]``: NaN for a token with NaN or infinity, whose numbers are all zero.
    """
    x = inputs.float()
    finite = x.isfinite().all(dim=1)
    # A token is a row of a weight to which the same rule applies.
    rows = torch.where(finite[:, None], x, 0.0)
    scale = scales_of(rows, _INT8)
    return codes_of(rows, scale, _INT8), torch.where(finite, scale[:, 0], torch.nan)


def int8_product(codes: Packed24, scale: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product as the kernels define it, to the bit, with torch on any device.

    Args:
        codes: The weight's int8 codes ``[rows, columns]``.
        scale: Of its rows, float32 ``[rows]``.
        inputs: ``[batch, columns]``.
        bias: ``[rows]`` or None.

    Returns:
        ``[batch, rows]`` in the dtype of the inputs.
    """
    tokens, token_scale = quantized_tokens(inputs)
    # Sums of fewer than 2^39 products of codes are exact in float64, and run on every device.
    sums = tokens.double() @ unpack24(codes).double().T
    product = sums.float() * token_scale[:, None] * scale
    if bias is not None:
        product = product + bias.float()
    return product.to(inputs.dtype)
