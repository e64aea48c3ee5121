"""How transformers opens our packed checkpoints: as the dense model, unpacked while it is read.

transformers calls whatever stores weights in another form a quantizer. Ours changes nothing but the
reading: afterwards the model is an ordinary dense one, which can be trained, saved and adapted.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparseserve.checkpoint import packed24, semi_structured
from sparseserve.checkpoint.formats import METHOD
from sparseserve.checkpoint.quantization import read_dtype
from sparseserve.checkpoint.stacks import STACKS_KEY
from sparseserve.errors import ArtifactError
from sparseserve.huggingface.names import StackPlace, stacks_on_disk
from sparseserve.huggingface.unpacking import (
    PARTS,
    POSITIONS,
    SCALE,
    VALUE_NAMES,
    PutTogether,
    UnpackMany,
    UnpackOne,
)

if TYPE_CHECKING:
    # transformers imports its models after its table of quantizers, and this module with the table.
    from transformers import PreTrainedModel

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
        unpacking = WeightConverter([*PARTS], [packed24.VALUES], [UnpackOne(self._dtype)])
        added = [*(_stacking(place, self._dtype) for place in self._stacks), unpacking]
        self._conversions = [
            *((self._unpacking_first(conversion), conversion) for conversion in conversions),
            *((conversion, None) for conversion in added),
        ]
        return [conversion for conversion, _ in self._conversions]

    def get_new_dtype(
        self, converter: WeightTransform, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """Return what ``param`` is rounded to on its way to ``converter``; None is nothing.

        Scales stay as they are stored, and what is made with them is rounded afterwards. Older
        releases do not ask, and leave scales alone.
        """
        steps = getattr(converter, "operations", ())
        if self._dtype and any(isinstance(step, UnpackOne | UnpackMany) for step in steps):
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
                first = f"{stem}.{VALUE_NAMES[0]}"
                sources |= {f"{stem}.{name}": first for name in (*VALUE_NAMES, *POSITIONS, SCALE)}
        if list(sources) == list(conversion._original_source_patterns):
            return conversion
        ours = WeightConverter(
            list(sources),
            list(conversion._original_target_patterns),
            [UnpackMany(sources, self._dtype), *conversion.operations],
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
    sources = {
        f"{stem}.{name}": stem for stem in stems for name in (*VALUE_NAMES, *POSITIONS, SCALE)
    }
    target = _LAYER_NUMBER.sub("", place.stack.tensor)
    return WeightConverter(
        list(sources), [target], [UnpackMany(sources, dtype), PutTogether(place.stack, stems)]
    )
