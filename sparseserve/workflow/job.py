"""What every run begins with, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sparseserve.checkpoint.formats import default_format
from sparseserve.devices import default_device
from sparseserve.layerwise.pipeline import Engine, LocalEngine
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe


@dataclass(frozen=True, slots=True)
class Job:
    """What to prune, how, where, and who hears of it.

    Attributes:
        source: A folder, or a name on the Hugging Face hub.
        recipe: What to do.
        export_format: How to store the result, a name in ``checkpoint.formats``; None is
            ``packed24`` for 2:4 and ``dense`` for other patterns.
        device: Where to prune; None is a CUDA device if there is one.
        progress: Told of every stage, layer and operator.
        engine: Who prunes the decoder layers; this process unless it is a ``RayEngine``.
    """

    source: str
    recipe: PruneRecipe = field(default_factory=PruneRecipe)
    export_format: str | None = None
    device: torch.device | None = None
    progress: PruneProgress = field(default_factory=PruneProgress)
    engine: Engine = field(default_factory=LocalEngine)

    @property
    def stored_as(self) -> str:
        """The format of the result."""
        return self.export_format or default_format(str(self.recipe.pattern))

    @property
    def runs_on(self) -> torch.device:
        """The device."""
        return self.device or default_device()
