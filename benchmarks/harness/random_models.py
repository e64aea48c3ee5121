"""Random models in the shape of real ones: what they take and how fast they run is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from sparseserve.checkpoint.tensors import write_checkpoint
from sparseserve.huggingface.opening import sketch_model
from sparseserve.testing import tiny_tokenizer


def write_random_model(folder: Path, **settings: object) -> int:
    """Write a Llama with random bfloat16 weights, one tensor after the other, and a tokenizer.

    Args:
        folder: Where to.
        settings: Of its configuration.

    Returns:
        The size of its files.
    """
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        **settings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    write_checkpoint(folder, _random_tensors(config))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random_tensors(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sketch_model(config).named_parameters():
        values = torch.ones(parameter.shape, dtype=torch.bfloat16)
        yield name, values if values.ndim == 1 else values.normal_(0, 0.02, generator=generator)
