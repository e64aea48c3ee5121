"""Codes of another tool that packed24 can hold as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseserve.checkpoint.quantization import LARGEST_CODE, Quantization
from sparseserve.foreign import bitmask24
from sparseserve.foreign.source import SCALE, ZERO, ForeignCheckpoint

_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def kept_codes(
    foreign: ForeignCheckpoint, modules: Sequence[str]
) -> tuple[Quantization, dict[str, Tensor]]:
    """Return how all of ``modules`` are rounded, and their scales ``[out, 1]`` in float32.

    packed24 has codes around zero, one scale a row, and inputs that a server rounds as well. One
    scale for a whole weight becomes one for each of its rows.

    Args:
        foreign: The checkpoint.
        modules: Those whose weights are 2:4.

    Returns:
        No quantization, and no scales, if that is not so of one of them.
    """
    config = foreign.config.get("quantization_config")
    if not isinstance(config, dict) or not _rounds_inputs(config):
        return Quantization(), {}
    kinds, scales = set(), {}
    for module in modules:
        found = _codes(foreign, module)
        if found is None:
            return Quantization(), {}
        kind, scales[module] = found
        kinds.add(kind)
    if len(kinds) != 1:
        return Quantization(), {}
    return Quantization(to=kinds.pop()), scales


def _rounds_inputs(config: Mapping[str, Any]) -> bool:
    """Whether the other tool rounds the inputs of everything that it quantises to 8 bits."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return False
    inputs = [
        group.get("input_activations") if isinstance(group, dict) else None
        for group in groups.values()
    ]
    return all(isinstance(found, dict) and found.get("num_bits") == 8 for found in inputs)


def _codes(foreign: ForeignCheckpoint, module: str) -> tuple[str, Tensor] | None:
    """Return the kind of a module's codes and its scales, None if packed24 cannot hold them."""
    checkpoint = foreign.checkpoint
    names = (f"{module}.{bitmask24.VALUES}", f"{module}.weight")
    name = next((name for name in names if name in checkpoint), None)
    if name is None or f"{module}.{SCALE}" not in checkpoint:
        return None
    codes, scale = checkpoint.tensor(name), checkpoint.tensor(f"{module}.{SCALE}").float()
    kind = _KINDS.get(codes.dtype)
    if kind is None or scale.numel() not in {1, len(codes)}:
        return None
    zero = f"{module}.{ZERO}"
    if zero in checkpoint and bool((checkpoint.tensor(zero) != 0).any()):
        return None
    positive = bool((scale > 0).all() and scale.isfinite().all())
    if not positive or float(codes.float().abs().max()) > LARGEST_CODE[kind]:
        return None
    return kind, scale.reshape(-1, 1).expand(len(codes), 1).contiguous()
