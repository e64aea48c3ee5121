"""vLLM's parallel layers, made and loaded by one rank after another in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.sparsity import TWO_FOUR

PARENT = "model.layers.0.mlp"
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def random_two_four(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return TWO_FOUR.project(torch.randn(rows, columns, generator=generator))


class Ranks:
    """Pretends to be one rank after another of a tensor parallel group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.rank = size, 0
        for module in ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter"):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: self.rank)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)

    def __iter__(self) -> Any:
        for rank in range(self.size):
            self.rank = rank
            yield rank


def packed_method_config(*modules: str) -> Any:
    from sparseserve.serving.plugin.config import SparseServeConfig

    config = SparseServeConfig(frozenset(f"{PARENT}.{name}" for name in modules))
    config.packed_modules_mapping = MERGED
    return config


def dense_method_config() -> Any:
    from sparseserve.serving.plugin.config import SparseServeConfig

    config = SparseServeConfig()
    config.packed_modules_mapping = MERGED
    return config


def load_packed(layer: Any, weight: Tensor, *shard: Any) -> None:
    packed = pack24(weight)
    for name, tensor in (("weight_values", packed.values), ("weight_indices", packed.indices)):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def load_dense(layer: Any, weight: Tensor, *shard: Any) -> None:
    layer.weight.weight_loader(layer.weight, weight, *shard)


def finish(layer: Any) -> Tensor:
    """Process the layer and return the dense weight ``[out, in]`` that it multiplies with."""
    layer.quant_method.process_weights_after_loading(layer)
    width = layer.input_size_per_partition
    product: Tensor = layer.quant_method.apply(layer, torch.eye(width), None)
    return product.T
