"""How transformers opens our packed checkpoints: as the dense model, unpacked while it is read.

transformers calls whatever stores weights in another form a quantizer. Ours changes nothing but the
reading: afterwards the model is an ordinary dense one, which can be trained, saved and adapted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparseserve.checkpoint import packed24, semi_structured
from sparseserve.checkpoint.formats import METHOD
from sparseserve.checkpoint.packed24 import Packed24
from sparseserve.checkpoint.quantization import read_dtype
from sparseserve.checkpoint.quantized24 import from_stored
from sparseserve.checkpoint.stacks import STACKS_KEY, ExpertStack
from sparseserve.errors import ArtifactError
from sparseserve.huggingface.names import StackPlace, stacks_on_disk

if TYPE_CHECKING:
    # transformers imports its models after its table of quantizers, and this module with the table.
    from transformers import PreTrainedModel

# transformers searches these expressions in the names of tensors, and takes the first that fits.
_VALUES = (f"{packed24.VALUES}$", f"{packed24.VERSION_1_VALUES}$")
# What says where the values lie, by format, and what makes the two a packed weight.
_POSITIONS: dict[str, Callable[[Tensor, Tensor], Packed24]] = {
    f"{packed24.INDICES}$": Packed24,
    f"{semi_structured.META}$": semi_structured.from_meta,
}
_SCALE = f"{packed24.SCALE}$"
_PARTS = (*_POSITIONS, _SCALE, *_VALUES)
_LAYER_NUMBER = re.compile(r".*\.\d+\.(?=\D)")
_FORMATS = (packed24.FORMAT, semi_structured.FORMAT)


def add_to(table: ModuleType) -> None:
    """Add packed24 to transformers' ``table`` of quantizers; a second call changes nothing."""
    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(Packed24Config)
        table.register_quantizer(METHOD)(Packed24Quantizer)


class Packed24Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is Any
    """The ``quantization_config`` of a packed checkpoint (docs/format.md)."""

    # Tells transformers that the model is dense once it is read, and to drop this configuration.
    dequantize = True

    def __init__(self, **described: Any) -> None:
        """Keep what config.json says.

        Raises:
            ArtifactError: A key is missing or has a value that this release does not read.
        """
        packed24.packed_modules(described, _FORMATS)
        for key, value in described.items():
            setattr(self, key, value)


class Packed24Quantizer(HfQuantizer):  # type: ignore[misc]  # likewise
    """Unpacks 2:4 weights while transformers reads them."""

    requires_calibration = True  # it reads packed weights, and packs none

    def __init__(self, quantization_config: Packed24Config, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        # What is done to weights, and what transformers would do to those of the dense model.
        self._conversions: list[tuple[WeightTransform, WeightTransform | None]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stacks: tuple[StackPlace, ...] = ()
        self._dtype = read_dtype(vars(quantization_config))

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained: it is dense."""
        return True

    def is_serializable(self) -> bool:
        """Whether the model can be saved: as a dense one."""
        return True

    def update_weight_conversions(
        self, conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Unpack before anything that transformers does to the weights of this model.

        Some models keep in one tensor what their files hold in many, such as experts; each of the
        many may be packed. Older releases do not give the ``model``.
        """
        unpacking = WeightConverter([*_PARTS], [packed24.VALUES], [_UnpackOne(self._dtype)])
        added = [*(_stacking(place, self._dtype) for place in self._stacks), unpacking]
        self._conversions = [
            *((self._unpacking_first(conversion), conversion) for conversion in conversions),
            *((conversion, None) for conversion in added),
        ]
        return [conversion for conversion, _ in self._conversions]

    def get_new_dtype(
        self, converter: WeightTransform, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Return what transformers rounds a tensor to on its way to ``converter``; None is nothing.

        Older releases do not ask, and leave the scales of codes as they are stored.
        """
        operations = getattr(converter, "operations", ())
        if self._dtype and any(isinstance(each, _UnpackOne | _UnpackMany) for each in operations):
            return None
        rounded: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return rounded

    def _unpacking_first(self, conversion: WeightTransform) -> WeightTransform:
        suffix = f".{packed24.VALUES}"
        # transformers refuses conversions from many names to many.
        if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) > 1:
            return conversion
        sources: dict[str, str] = {}
        for source in conversion._original_source_patterns:
            stem = source.removesuffix("$").removesuffix(suffix)
            if stem == source.removesuffix("$"):
                sources[source] = source
            else:
                first = f"{stem}.{_VALUES[0]}"
                sources |= {f"{stem}.{name}": first for name in (*_VALUES, *_POSITIONS, _SCALE)}
        if list(sources) == list(conversion._original_source_patterns):
            return conversion
        ours = WeightConverter(
            list(sources),
            list(conversion._original_target_patterns),
            [_UnpackMany(sources, self._dtype), *conversion.operations],
            force_cpu=conversion.force_cpu,
        )
        ours.scope_prefix, ours.base_model_prefix = (
            conversion.scope_prefix,
            conversion.base_model_prefix,
        )
        return ours

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        """Remember the shapes: transformers compares none where there is a quantizer.

        Remember, too, which experts the model has in one tensor that its files would have so.
        """
        if getattr(self.quantization_config, STACKS_KEY, None):
            self._stacks = stacks_on_disk(model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        """Forget how it was read, else ``save_pretrained`` would do all of it backwards.

        Raises:
            ArtifactError: A weight is of another shape than the model's.
        """
        for name, tensor in model.named_parameters():
            if tuple(tensor.shape) != self._shapes.get(name, tuple(tensor.shape)):
                raise ArtifactError(
                    f"{name} is {list(tensor.shape)}, but config.json asks for "
                    f"{list(self._shapes[name])}: its indices are missing, or it was stored for "
                    "another model: copy or export the checkpoint again"
                )
        model._weight_conversions = [
            original
            for conversion, original in self._conversions
            if original is not None and conversion.was_used()
        ]
        return model


def _stacking(place: StackPlace, dtype: torch.dtype | None) -> WeightConverter:
    """Return what puts experts with tensors of their own into the one tensor of the model."""
    first, *_ = place.modules
    # All layers have the same names after their number, and transformers takes care of the rest.
    start = _LAYER_NUMBER.sub("", first.rsplit(".", 2)[0])
    stems = [f"{start}.*.{projection}" for projection in place.projections]
    sources = {f"{stem}.{name}": stem for stem in stems for name in (*_VALUES, *_POSITIONS, _SCALE)}
    target = _LAYER_NUMBER.sub("", place.stack.tensor)
    return WeightConverter(
        list(sources), [target], [_UnpackMany(sources, dtype), _PutTogether(place.stack, stems)]
    )


class _UnpackOne(ConversionOps):  # type: ignore[misc]  # likewise
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
        if _POSITIONS.keys() & input_dict.keys():
            module = model.get_submodule(full_layer_name.rpartition(".")[0])
            weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        # transformers leaves the dtype of renamed tensors alone, and of codes.
        wanted = model.get_parameter_or_buffer(full_layer_name).dtype
        return {full_layer_name: weight.to(wanted)}


class _UnpackMany(ConversionOps):  # type: ignore[misc]  # likewise
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
            if leaf in _PARTS:
                together.setdefault(self._sources[name], {})[leaf] = tensors
            else:  # such as biases
                dense[name] = tensors
        for source, parts in together.items():
            dense[source] = _unpacked(full_layer_name, parts, self._dtype)
        wanted = model.get_parameter_or_buffer(full_layer_name).dtype
        return {name: [each.to(wanted) for each in tensors] for name, tensors in dense.items()}


class _PutTogether(ConversionOps):  # type: ignore[misc]  # likewise
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
    values = [tensor for key in _VALUES for tensor in parts.get(key, ())]
    for key in _POSITIONS.keys() & parts.keys():
        positions = list(parts[key])
        narrow = min(tensor.shape[-1] for tensor in values)
        packed = [tensor.shape[-1] == narrow for tensor in values]
        if len(positions) != sum(packed):
            raise ArtifactError(
                f"{name}: {sum(packed)} packed weights for {len(positions)} tensors of positions: "
                "copy or export the checkpoint again"
            )
        scales: Sequence[Tensor | None] = parts.get(_SCALE, [])
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
    return packed24.unpack24(_POSITIONS[key](values, positions))
