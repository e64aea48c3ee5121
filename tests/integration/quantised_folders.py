"""Tiny models in the quantised forms that are published, beside the dense ones they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseserve.testing import save_tiny_model

# The eight magnitudes of a 4-bit float with two bits of exponent and one of fraction.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP8_BLOCK = 32


def save_fp8(family: str, quantised: Path, dense: Path) -> None:
    """Save the projections of a model in 8 bits, one scale a block of 32 by 32."""
    stored, plain = _tensors(family, quantised, dense)
    for name, weight in plain.items():
        if weight.ndim == 2 and "proj" in name:
            stored[name], stored[f"{name}_scale_inv"], plain[name] = _fp8(weight)
    settings = {"quant_method": "fp8", "weight_block_size": [_FP8_BLOCK] * 2, "fmt": "e4m3"}
    _save(quantised, stored, {**settings, "activation_scheme": "dynamic"})
    _save(dense, plain, None)


def save_mxfp4(quantised: Path, dense: Path) -> None:
    """Save the experts of a tiny gpt-oss in 4 bits, one power of two for 32 of them."""
    stored, plain = _tensors("gpt_oss", quantised, dense)
    for name in [name for name in plain if name.endswith("experts.gate_up_proj")]:
        for whole in (name, name.replace("gate_up_proj", "down_proj")):
            blocks, scales, plain[whole] = _mxfp4(plain[whole])
            del stored[whole]
            stored |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
    _save(quantised, stored, {"quant_method": "mxfp4"})
    _save(dense, plain, None)


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales, and what they mean."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // _FP8_BLOCK, _FP8_BLOCK, columns // _FP8_BLOCK, _FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = codes.float() * scales[:, None, :, None]
    return codes.view(weight.shape), scales, meant.view(weight.shape).to(torch.bfloat16)


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, exponents, and what they mean, for experts ``[experts, in, out]``."""
    rows = weight.float().transpose(1, 2)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    exponents = (groups.abs().amax(dim=-1) / 6).log2().ceil()
    scaled = groups * (-exponents).exp2()[..., None]
    nearest = (scaled.abs()[..., None] - _FP4).abs().argmin(dim=-1)
    codes = (nearest | (scaled < 0).long() << 3).to(torch.uint8)
    meant = _FP4[nearest] * scaled.sign() * exponents.exp2()[..., None]
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    dense = meant.reshape(rows.shape).transpose(1, 2).contiguous().to(torch.bfloat16)
    return packed, (exponents + 127).to(torch.uint8), dense


def _tensors(
    family: str, quantised: Path, dense: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for folder in (quantised, dense):
        save_tiny_model(family, folder, dtype=torch.bfloat16)
    return load_file(quantised / "model.safetensors"), load_file(dense / "model.safetensors")


def _save(folder: Path, tensors: dict[str, Tensor], settings: Mapping[str, object] | None) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        config = folder / "config.json"
        read = json.loads(config.read_text())
        config.write_text(json.dumps({**read, "quantization_config": settings}))
