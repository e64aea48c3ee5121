"""Writes the fixtures beside it with the last release of compressed-tensors that could.

It needs no environment of its own, only a folder::

    pip install --no-deps --target FOLDER compressed-tensors==0.14.0.1 loguru
    PYTHONPATH=FOLDER python tests/data/foreign/make.py

``expected.json`` has the sha256 of every dense tensor: what was compressed, or, for codes, what the
library's own ``dequantize`` makes of them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
    Sparse24BitMaskTensor,
)
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import (
    Marlin24Compressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import TINY_VOCABULARY, tiny_tokenizer

HERE = Path(__file__).parent
SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
State = dict[str, Tensor]


def tiny_llama(dtype: torch.dtype, intermediate: int = 64) -> LlamaForCausalLM:
    """Return a model of one layer, 2:4 in all of its linears."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = TWO_FOUR.project(module.weight.data)
    return model


def linears(model: LlamaForCausalLM) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


def dense_state(model: LlamaForCausalLM) -> State:
    return {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}


def write(
    name: str, model: LlamaForCausalLM, stored: State, dense: State, told: dict[str, object]
) -> dict[str, str]:
    """Write one fixture; return the sha256 of each dense tensor."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    contiguous = {key: tensor.contiguous() for key, tensor in stored.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **told}, indent=1) + "\n")
    tiny_tokenizer().save_pretrained(folder)
    return {
        key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, tensor in sorted(dense.items())
    }


def bitmask(dtype: torch.dtype) -> tuple[LlamaForCausalLM, State, State]:
    model = tiny_llama(dtype)
    dense = dense_state(model)
    stored = dict(dense)
    for module in linears(model):
        weight = stored.pop(f"{module}.weight")
        stored |= Sparse24BitMaskTensor.from_dense(weight).dict(f"{module}.weight")
    return model, stored, dense


def quantized_bitmask() -> tuple[LlamaForCausalLM, State, State]:
    """Codes of 8 bits, a scale for each output, and the zeros in the places of 2:4."""
    model = tiny_llama(torch.bfloat16)
    dense = dense_state(model)
    stored = dict(dense)
    for module in linears(model):
        weight = stored.pop(f"{module}.weight").float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).to(torch.bfloat16)
        args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
        codes = quantize(weight, scale.float(), None, args, dtype=torch.int8)
        dense[f"{module}.weight"] = dequantize(codes, scale.float(), args=args).to(torch.bfloat16)
        stored |= Sparse24BitMaskTensor.from_dense(codes).dict(f"{module}.weight")
        stored[f"{module}.weight_scale"] = scale
        stored[f"{module}.input_scale"] = torch.ones(1)
    return model, stored, dense


def marlin(bits: int) -> tuple[LlamaForCausalLM, State, State]:
    # An intermediate size of 512 makes groups of 128 that are permuted, the others do not.
    model = tiny_llama(torch.float16, intermediate=512)
    dense = dense_state(model)
    state = dict(dense)
    schemes = {}
    for module in linears(model):
        weight = state[f"{module}.weight"].float()
        grouped = weight.shape[1] % 128 == 0
        groups = weight.shape[1] // 128 if grouped else 1
        kind = ("group", 128) if grouped else ("channel", None)
        args = QuantizationArgs(num_bits=bits, strategy=kind[0], group_size=kind[1], symmetric=True)
        schemes[module] = QuantizationScheme(targets=["Linear"], weights=args)
        largest = weight.view(len(weight), groups, -1).abs().amax(dim=-1)
        scale = (largest / (2 ** (bits - 1) - 1)).half()
        state[f"{module}.weight_scale"] = scale
        codes = quantize(weight.half(), scale, None, args).float()
        by_group = codes.view(len(weight), groups, -1) * scale.float()[..., None]
        # A code that rounds to zero has no sign.
        dense[f"{module}.weight"] = by_group.view_as(weight).half() + 0.0
    return model, Marlin24Compressor().compress(state, schemes), dense


def main() -> None:
    warnings.simplefilter("ignore")
    expected = {}
    method = {"quant_method": "compressed-tensors"}
    plain: dict[str, object] = {
        "quantization_config": {**method, "format": "dense", "sparsity_config": SPARSITY}
    }
    told: dict[str, object] = {"quantization_config": {**method, "format": "marlin-24"}}
    expected["bitmask-bfloat16"] = write("bitmask-bfloat16", *bitmask(torch.bfloat16), plain)
    expected["bitmask-int8"] = write("bitmask-int8", *quantized_bitmask(), plain)
    for bits in (4, 8):
        told = {
            "quantization_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}
        }
        expected[f"marlin-int{bits}"] = write(f"marlin-int{bits}", *marlin(bits), told)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
