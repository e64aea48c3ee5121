"""How a decoder layer is called for each window, where what it is given depends on the tokens.

Some models hand their layers more than hidden states: keys and values of an earlier layer, choices
of tokens, embeddings for each layer. Those of the dense model are kept on the disk, and both the
dense and the pruned layer receive them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import varying_arguments
from sparseserve.models.structure import ModelStructure


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """The calls of one layer, window by window.

    Attributes:
        first: That of one window, on the device and in the dtype that the layer runs in.
        varying: The tensors of the arguments that depend on the tokens, one file for each.
    """

    first: LayerCall
    varying: tuple[HiddenStates, ...] = ()

    def __getitem__(self, window: int) -> LayerCall:
        """Return that of a window, numbered as the hidden states are."""
        if not self.varying:
            return self.first
        places = self.first.varying_tensors()
        return self.first.filled(
            kept[window].to(place) for kept, place in zip(self.varying, places, strict=True)
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerCalls:
        """Return the calls with their tensors on ``device``, the floating ones as ``dtype``."""
        return replace(self, first=self.first.to(device, dtype))


@dataclass(frozen=True, slots=True)
class VaryingArguments:
    """What depends on the tokens of the arguments of all layers.

    Attributes:
        of_layers: The files, by the name of the layer; of the same length as the hidden states.
    """

    of_layers: Mapping[str, tuple[HiddenStates, ...]] = field(default_factory=dict)

    @classmethod
    def record(
        cls,
        folder: Path,
        model: nn.Module,
        structure: ModelStructure,
        calls: Sequence[LayerCall],
        windows: Sequence[Tensor],
    ) -> VaryingArguments:
        """Run the dense ``model`` on ``windows`` and keep what depends on them, in ``folder``.

        Raises:
            ArtifactError: The disk is full or cannot be written.
            ValueError: A tensor has another shape, or goes to other layers, in another window.
        """
        if not any(call.varying for call in calls):
            return cls()
        found = varying_arguments(model, structure, calls, windows)
        tensors, places = next(found)

        def of_every_window() -> Iterator[Sequence[Tensor]]:
            yield tensors
            for others, elsewhere in found:
                if elsewhere != places:
                    raise ValueError("tensors go to other layers in another window")
                yield others

        files = HiddenStates.write_several(
            [folder / f"argument-{number}" for number in range(len(tensors))], of_every_window()
        )
        return cls(
            {
                layer.name: tuple(files[number] for number in numbers)
                for layer, numbers in zip(structure.layers, places, strict=True)
            }
        )

    def without_first(self, count: int) -> VaryingArguments:
        """Return those of the windows after the first ``count``."""
        return VaryingArguments(
            {
                layer: tuple(kept.without_first(count) for kept in files)
                for layer, files in self.of_layers.items()
            }
        )

    def calls(self, layer: str, call: LayerCall) -> LayerCalls:
        """Return the calls of ``layer``, of which ``call`` is one."""
        return LayerCalls(call, self.of_layers.get(layer, ()))
