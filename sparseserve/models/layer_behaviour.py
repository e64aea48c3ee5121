"""What changed weights do to what a decoder layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sparseserve.models.hooks import hidden_output
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states
from sparseserve.models.structure import ModelStructure

# Of what the layer's output moves by when only half of a change is made. Rounding leaves 1e-6.
_TOLERANCE = 1e-3
_CPU = torch.device("cpu")

Change = Callable[[nn.Module], object]


class LayerBehaviour:
    """A copy of a decoder layer in float32 whose weights are changed, tried, and put back."""

    def __init__(self, module: nn.Module, hidden: Tensor, call: LayerCall) -> None:
        """Run the layer as it is.

        Args:
            module: The layer, in any dtype on any device; not changed.
            hidden: What enters it, ``[1, T, hidden]``.
            call: How it is called besides.
        """
        self._dense = copy_layer(module, _CPU, torch.float32)
        self._layer = copy_layer(self._dense)
        self._hidden = hidden.float()
        self._call = call.to(_CPU, torch.float32)
        self._outputs = self._run()

    def undone(self, change: Change, remedy: Change, modules: set[str]) -> bool:
        """Whether ``remedy`` undoes what ``change`` does to the output.

        What the layer hands to later ones besides counts as output: Gemma 3n and Gemma 4 hand their
        values on. A change that moves nothing shows nothing, and counts as not undone.

        Args:
            change: Changes weights in place.
            remedy: Changes others.
            modules: The names of all modules that the two change.
        """
        change(self._layer)
        moved = self._distance()
        remedy(self._layer)
        left = self._distance()
        for name in modules:
            self._layer.get_submodule(name).load_state_dict(
                self._dense.get_submodule(name).state_dict()
            )
        return moved > 0 and left <= _TOLERANCE * moved

    def _distance(self) -> float:
        moved = zip(self._run(), self._outputs, strict=True)
        return sum(float((one.double() - other.double()).norm()) for one, other in moved)

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        returned, handed = self._call.run(self._layer, self._hidden)
        output = hidden_output(returned)
        assert output is not None, "the layers of a structure return hidden states"
        return [output, *handed]


def layer_behaviours(
    model: nn.Module, structure: ModelStructure, window: Tensor
) -> Iterator[LayerBehaviour]:
    """Yield every decoder layer, each on what enters the first one.

    Args:
        model: A causal language model in evaluation mode, on the CPU; not changed.
        structure: Its layers.
        window: Token ids ``[T]``; a few show what a layer computes.
    """
    calls = capture_layer_calls(model, structure, [window])
    [hidden] = entering_states(model, structure, [window])
    for layer, call in zip(structure.layers, calls, strict=True):
        yield LayerBehaviour(model.get_submodule(layer.name), hidden, call)
