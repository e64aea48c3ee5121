"""What transformers does to the tensors of packed checkpoints while it reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from sparseserve.checkpoint import packed24, semi_structured
from sparseserve.checkpoint.packed24 import Packed24
from sparseserve.checkpoint.quantized24 import from_stored
from sparseserve.checkpoint.stacks import ExpertStack
from sparseserve.errors import ArtifactError

if TYPE_CHECKING:
    # transformers imports its models after this module.
    from transformers import PreTrainedModel

# transformers searches these expressions in the names of tensors, and takes the first that fits.
VALUE_NAMES = (f"{packed24.VALUES}$", f"{packed24.VERSION_1_VALUES}$")
# What says where the values lie, by format, and what makes the two a packed weight.
POSITIONS: dict[str, Callable[[Tensor, Tensor], Packed24]] = {
    f"{packed24.INDICES}$": Packed24,
    f"{semi_structured.META}$": semi_structured.from_meta,
}
SCALE = f"{packed24.SCALE}$"
PARTS = (*POSITIONS, SCALE, *VALUE_NAMES)


class UnpackOne(ConversionOps):  # type: ignore[misc]  # transformers is Any
    """The weight of one module from its packed tensors; every other weight as it is.

    ``dtype`` is what quantised weights are rounded to.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Return the weight ``full_layer_name`` in the orientation and dtype of ``model``."""
        (weight,) = _unpacked(full_layer_name, input_dict, self._dtype)
        if POSITIONS.keys() & input_dict.keys():
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        # transformers leaves the dtype of renamed tensors alone, and of codes.
        wanted = model.get_parameter_or_buffer(full_layer_name).dtype
        return {full_layer_name: weight.to(wanted)}


class UnpackMany(ConversionOps):  # type: ignore[misc]  # likewise
    """The weights of many modules, before they are put together.

    ``sources`` gives the name, among those that the next operation knows, that each of ours is for,
    and ``dtype`` is what quantised weights are rounded to.
    """

    def __init__(self, sources: dict[str, str], dtype: torch.dtype | None) -> None:
        self._sources, self._dtype = sources, dtype

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Return the dense weights under the names that the next operation knows."""
        together: dict[str, dict[str, list[Tensor]]] = {}
        dense: dict[str, list[Tensor]] = {}
        for name, tensors in input_dict.items():
            leaf = name.rpartition(".")[2]
            if leaf in PARTS:
                together.setdefault(self._sources[name], {})[leaf] = tensors
            else:  # such as biases
                dense[name] = tensors
        for source, parts in together.items():
            dense[source] = _unpacked(full_layer_name, parts, self._dtype)
        wanted = model.get_parameter_or_buffer(full_layer_name).dtype
        return {name: [each.to(wanted) for each in tensors] for name, tensors in dense.items()}


class PutTogether(ConversionOps):  # type: ignore[misc]  # likewise
    """The tensor of all experts from the dense weights of each, projection by projection."""

    def __init__(self, stack: ExpertStack, stems: list[str]) -> None:
        self._stack, self._stems = stack, stems

    def convert(
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """Return the tensor in the layout that the model has it in."""
        stack = self._stack
        weights: list[tuple[str, Tensor]] = []
        for stem, projection in zip(self._stems, stack.projections, strict=True):
            if len(found := input_dict.get(stem, ())) != stack.experts:
                raise ArtifactError(
                    f"{full_layer_name}: {len(found)} experts instead of {stack.experts}: "
                    "copy or export the checkpoint again"
                )
            weights += [(stack.module(number, projection), w) for number, w in enumerate(found)]
        return {full_layer_name: stack.put_together(weights)}


def _unpacked(name: str, parts: dict[str, list[Tensor]], dtype: torch.dtype | None) -> list[Tensor]:
    """Return the dense weights of the parameter ``name``, in ``dtype`` what is quantised.

    ``parts`` are lists in the order of the modules. All positions have values, but the values of
    some modules, such as an expert that stayed dense, may have no positions. Where the packed ones
    are quantised, each has a scale.
    """
    values = [tensor for key in VALUE_NAMES for tensor in parts.get(key, ())]
    for key in POSITIONS.keys() & parts.keys():
        positions = list(parts[key])
        narrow = min(tensor.shape[-1] for tensor in values)
        packed = [tensor.shape[-1] == narrow for tensor in values]
        if len(positions) != sum(packed):
            raise ArtifactError(
                f"{name}: {sum(packed)} packed weights for {len(positions)} tensors of positions: "
                "copy or export the checkpoint again"
            )
        scales: Sequence[Tensor | None] = parts.get(SCALE, [])
        if len(scales) not in {0, len(positions)}:
            raise ArtifactError(
                f"{name}: {len(scales)} scales for {len(positions)} packed weights: "
                "copy or export the checkpoint again"
            )
        own = scales if scales else [None] * len(positions)
        places = iter(zip(positions, own, strict=True))
        return [
            _dense(key, tensor, *next(places), dtype) if is_packed else tensor
            for tensor, is_packed in zip(values, packed, strict=True)
        ]
    return values


def _dense(
    key: str, values: Tensor, positions: Tensor, scale: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Return the dense weight of one module; ``key`` says what its ``positions`` are."""
    if (scale is None) != (dtype is None):
        raise ArtifactError(
            "config.json and the tensors disagree about whether weights are rounded"
        )
    if scale is not None and dtype is not None:
        return packed24.unpack24(from_stored(values, positions, scale, dtype).dequantized())
    return packed24.unpack24(POSITIONS[key](values, positions))
