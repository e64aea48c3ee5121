"""Room in vLLM's cache for the states of layers that keep one instead of keys and values.

Mamba mixers, linear attention and short convolutions keep a state of fixed size for each sequence.
vLLM puts it into a page of the cache that keys and values are kept in, and makes all pages as large
as a state, so a cache that is sized by keys and values alone may not hold one sequence.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparseserve.serving.launch.policy import BLOCK_TOKENS, SPARE_BLOCKS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Pages of a layer for each sequence: one for its state, one for its last tokens, and one where
# layers do not divide evenly into groups that share their pages.
_PAGES = 3


def with_room_for_states(options: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's ``options`` with a cache that also holds the states of ``max_num_seqs``."""
    from vllm import EngineArgs

    config = EngineArgs(**options).create_engine_config()
    if not config.model_config.is_hybrid:
        return options
    page = _state_bytes(config) + _block_bytes(config)
    layers = config.model_config.get_total_num_hidden_layers()
    pages = layers * (_PAGES * options["max_num_seqs"] + SPARE_BLOCKS)
    return options | {
        "kv_cache_memory_bytes": options["kv_cache_memory_bytes"] + pages * page,
    }


def _state_bytes(config: VllmConfig) -> int:
    """Return the size of one sequence's state in the layer where it is largest."""
    from vllm.model_executor.models import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls(
        config.model_config.architecture, model_config=config.model_config
    )
    shapes = model.get_mamba_state_shape_from_config(config)
    dtypes = model.get_mamba_state_dtype_from_config(config)
    return sum(
        math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _block_bytes(config: VllmConfig) -> int:
    """Return the size of a layer's keys and values of one block of tokens."""
    model = config.model_config
    heads = int(model.get_num_kv_heads(config.parallel_config))
    return 2 * heads * int(model.get_head_size()) * int(model.dtype.itemsize) * BLOCK_TOKENS
