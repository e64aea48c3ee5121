"""A dense model in 8 bits (W8A8) as vLLM reads it, each weight rounded to the nearest.

The folder is of the kind ``int-quantized`` of compressed-tensors: an int8 code for each weight of a
linear, a scale for each row, and inputs rounded by vLLM token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint.quantization import Quantization, codes_of, scales_of
from sparseserve.checkpoint.tensors import Checkpoint, write_checkpoint, write_json
from sparseserve.exporters.side_files import copy_side_files

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def write_dense_int8(model: Path, out: Path, operators: frozenset[str]) -> Path:
    """Write ``model`` to the new folder ``out`` with the weights of ``operators`` in 8 bits.

    Args:
        model: A dense folder, its linears stored ``[out, in]``.
        out: Made here.
        operators: Names of all linears but the head.
    """
    write_checkpoint(out, _tensors(Checkpoint.open(model), operators))
    copy_side_files(model, out)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**config, "dtype": "bfloat16", "quantization_config": _CONFIG})
    return out


def _tensors(checkpoint: Checkpoint, operators: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    int8 = Quantization(to="int8")
    for name, tensor in checkpoint.tensors():
        module = name.removesuffix(".weight")
        if module not in operators:
            yield name, tensor.to(torch.bfloat16)
            continue
        scales = scales_of(tensor, int8)
        yield name, codes_of(tensor, scales, int8).to(torch.int8)
        yield f"{module}.weight_scale", scales.to(torch.bfloat16)
