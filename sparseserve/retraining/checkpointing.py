"""What a whole model needs to run forwards and backwards on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparseserve.devices import autocast, pruning_dtype
from sparseserve.models.layer_list import find_decoder_layers


@contextmanager
def in_pruning_dtype(model: nn.Module) -> Iterator[dict[nn.Parameter, torch.dtype]]:
    """Let a model compute in ``devices.pruning_dtype`` in the block; yield the stored dtypes."""
    stored_as = {parameter: parameter.dtype for parameter in model.parameters()}
    try:
        for parameter in stored_as:
            parameter.data = parameter.data.to(pruning_dtype(parameter.dtype, parameter.device))
        yield stored_as
    finally:
        for parameter, dtype in stored_as.items():
            parameter.data = parameter.data.to(dtype)


@contextmanager
def autocast_forward(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Let products of ``model`` round their factors to ``dtype`` in the block; None lets them be.

    What else is computed in the block, such as the merge of updates, is not touched.
    """
    forward = model.forward

    @wraps(forward)
    def rounded(*args: Any, **kwargs: Any) -> Any:
        with autocast(model.device, dtype):
            return forward(*args, **kwargs)

    model.forward = rounded
    try:
        yield
    finally:
        del model.forward


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
