"""What is done to a decoder layer before its operators are pruned or rounded.

None of it changes what the layer computes; all of it makes what follows lose less.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sparseserve.layerwise.progress import PruneProgress
from sparseserve.models.channel_sources import ChannelSource, find_channel_sources
from sparseserve.models.structure import ModelStructure
from sparseserve.models.value_heads import ValueHeads, find_value_heads
from sparseserve.recipe.settings import PruneRecipe

# A few tokens show what a layer computes; more would only cost time.
_TRIED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Preparation:
    """Where a layer may be changed.

    Attributes:
        heads: Where the values of its attention are rotated.
        channels: Where its channels are scaled.
    """

    heads: tuple[ValueHeads, ...] = ()
    channels: tuple[ChannelSource, ...] = ()


def preparations(
    model: nn.Module,
    structure: ModelStructure,
    recipe: PruneRecipe,
    window: Tensor,
    progress: PruneProgress,
) -> tuple[Preparation, ...]:
    """Return what ``recipe`` does to each layer beforehand.

    Args:
        model: The model as it is, on the CPU.
        structure: Its layers.
        recipe: Says what to do.
        window: Token ids ``[T]``.
        progress: Told where nothing can be done.
    """
    none = ((),) * len(structure.layers)
    heads: tuple[tuple[ValueHeads, ...], ...] = none
    channels: tuple[tuple[ChannelSource, ...], ...] = none
    if recipe.rotate != "none":
        heads = find_value_heads(model, structure, window[:_TRIED_TOKENS])
        if not any(heads):
            progress.stage("rotating no heads: nowhere in this model can values be rotated")
    if recipe.smooths_inputs:
        channels = find_channel_sources(model, structure, window[:_TRIED_TOKENS])
    return tuple(map(Preparation, heads, channels))
