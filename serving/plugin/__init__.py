"""The entry point through which vLLM learns of sparseserve checkpoints."""

from __future__ import annotations

from sparseserve.serving.plugin.method import METHOD_NAME


def register() -> None:
    """Make ``quant_method: sparseserve`` and ``--quantization sparseserve`` known to vLLM.

    vLLM calls this in every process of every model it serves, sometimes twice, so it imports
    nothing heavy, touches no device and does nothing the second time.
    """
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if METHOD_NAME in QUANTIZATION_METHODS:
        return

    import torch

    # Linux kills a process that uses AMX's tiles unasked. vLLM's attention does; oneDNN asks, but
    # only before its own first product on them, which a model of 2:4 layers may never have.
    torch.cpu._init_amx()

    from sparseserve.serving.plugin.config import SparseServeConfig

    register_quantization_config(METHOD_NAME)(SparseServeConfig)
