"""Random models in the shape of real ones: what they take and how fast they run is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig

from sparseserve.checkpoint.tensors import write_checkpoint
from sparseserve.huggingface.opening import sketch_model
from sparseserve.sparsity import TWO_FOUR
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
    config = LlamaConfig(**settings, **_tokens(), architectures=["LlamaForCausalLM"])
    write_checkpoint(folder, _random_tensors(config))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_random_mixture(folder: Path, **settings: object) -> None:
    """Write an OLMoE with random 2:4 weights in bfloat16, which memory must hold, and a tokenizer.

    Calibration would leave many experts dense: a random router sends most tokens to a few of them.

    Args:
        folder: Where to.
        settings: Of its configuration.
    """
    torch.manual_seed(0)
    config = OlmoeConfig(**settings, **_tokens())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.model.layers.named_parameters():
        if parameter.ndim > 1 and not name.endswith("gate.weight"):
            flat = parameter.data.flatten(0, -2)
            flat.copy_(TWO_FOUR.project(flat))
    # transformers splits its stacks of experts into the tensors that such models publish.
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _tokens() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "bfloat16",
    }


def _random_tensors(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sketch_model(config).named_parameters():
        values = torch.ones(parameter.shape, dtype=torch.bfloat16)
        yield name, values if values.ndim == 1 else values.normal_(0, 0.02, generator=generator)
