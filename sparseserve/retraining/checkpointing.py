"""What a whole model needs to run forwards and backwards on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseserve.models.layer_list import find_decoder_layers


@contextmanager
def float32_on_cpu(model: nn.Module) -> Iterator[dict[nn.Parameter, torch.dtype]]:
    """Let a model on the CPU compute in float32 while the block runs; yield the stored dtypes.

    The 16-bit arithmetic of CPUs is slow where it is exact and inexact where it is not.
    """
    stored_as = {parameter: parameter.dtype for parameter in model.parameters()}
    try:
        for parameter in stored_as:
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.float()
        yield stored_as
    finally:
        for parameter, dtype in stored_as.items():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def checkpointed_layers(model: nn.Module, window: Tensor) -> Iterator[None]:
    """Let every decoder layer keep its input only, and run again for its gradients."""
    layers = [layer for _, layer in find_decoder_layers(model, window[None, :8])]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
