"""Scaling channels before weights are rounded to int8, so that int8 inputs lose less.

Xiao et al. 2023, "SmoothQuant". A server rounds each token's inputs with one scale, so a channel
that is far larger than the others leaves few codes to them. Dividing it by a factor, and
multiplying the column that reads it, moves a part of the trouble into the weights, whose rounding
errors are repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.channel_sources import ChannelSource
from sparseserve.models.layers import copy_layer, group_inputs, layer_weight
from sparseserve.models.structure import Operator, OperatorGroup

# Sizes of channels add a pass over so many windows at most, however many there are.
_WINDOWS = 32
# The share of a channel's size that goes to the weights.
_SHARE = 0.4
# A channel that the calibration text hardly reaches says little: it is scaled no further than this.
_FARTHEST = 2.0**6


def smoothed(
    context: LayerContext, sources: Sequence[ChannelSource], planned: Sequence[Operator]
) -> tuple[LayerContext, tuple[str, ...]]:
    """Return the layer with its channels scaled, and the names of what makes them.

    Args:
        context: The layer before it is rounded; left as it is.
        sources: Where its channels may be scaled.
        planned: The operators that will be rounded. Only where all that make or read a channel are
            among them is it scaled: the others stay as they are.

    Raises:
        NumericalError: An input is not finite.
    """
    chosen = [source for source in sources if source.operators <= set(planned)]
    if not chosen:
        return context, ()
    factors = [
        smoothing_factors(inputs, _column_sizes(context.module, source.group))
        for source, inputs in zip(chosen, _input_sizes(context, chosen), strict=True)
    ]
    module = copy_layer(context.module)
    for source, factor in zip(chosen, factors, strict=True):
        source.scale(module, factor, context.storage_dtype)
    names = tuple(f"{context.layer.name}.{source.module}" for source in chosen)
    # What was kept of its inputs is in the old scale: it is run again instead.
    dense = context.dense and replace(context.dense, inputs=())
    return replace(context, module=module, dense=dense), names


def _input_sizes(context: LayerContext, sources: Sequence[ChannelSource]) -> list[Tensor]:
    """Return the root mean square of each channel that each of ``sources`` makes."""
    groups = [source.group for source in sources]
    squares = [torch.zeros(group.in_features, device=context.device) for group in groups]
    tokens = 0
    for window, call in islice(context.windows(context.entering), _WINDOWS):
        inputs = group_inputs(context.module, window, call, groups)
        tokens += len(inputs[0])
        for total, found in zip(squares, inputs, strict=True):
            total.add_(found.float().square().sum(dim=0))
    return [(total / tokens).sqrt() for total in squares]


def _column_sizes(module: nn.Module, group: OperatorGroup) -> Tensor:
    """Return the root mean square of each column, the largest of all operators that read it."""
    weights = (layer_weight(module, operator).float() for operator in group.operators)
    return torch.stack([weight.square().mean(dim=0).sqrt() for weight in weights]).amax(dim=0)


def smoothing_factors(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return what each channel is divided by, ``[in]``, about 1 on the mean.

    Args:
        inputs: Root mean squares of the channels, ``[in]``, in any unit.
        weights: Of the columns that read them, ``[in]``, likewise.
    """
    known = (inputs > 0) & (weights > 0)
    if not bool(known.any()):
        return torch.ones_like(inputs, dtype=torch.float32)
    logarithms = _SHARE * inputs.double().log2() - (1 - _SHARE) * weights.double().log2()
    logarithms = (logarithms - logarithms[known].mean()).where(known, 0)
    farthest = torch.tensor(_FARTHEST).log2()
    return logarithms.clamp(-farthest, farthest).exp2().float()
