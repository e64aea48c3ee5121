"""The tensors of a model as its checkpoint has them: under other names, taken apart, or merged."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sparseserve.errors import UnsupportedModelError, first_line

# Up to the number of a layer, or of a block of another part.
_LAYER = re.compile(r"\D*?\.\d+(?=\.)")


def stored_tensors(
    model: PreTrainedModel, *, first_rows: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``save_pretrained`` would write, one layer after the other.

    transformers converts a model whole, and needs its size in memory where experts are taken apart.
    A layer's tensors hold all that its conversions need.

    Args:
        model: With its weights.
        first_rows: Whether to take only the first row of every matrix: names without bulk.

    Raises:
        UnsupportedModelError: transformers cannot save the model.
    """
    try:
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        for part in _parts(remove_tied_weights_from_state_dict(state, model)):
            chosen = {
                name: tensor[:1] if first_rows and tensor.ndim > 1 else tensor
                for name, tensor in part.items()
            }
            yield from sorted(revert_weight_conversion(model, chosen).items())
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{model.config.name_or_path or model.config.model_type}: transformers cannot save "
            f"this model ({first_line(error)}): prune one that it can load and save"
        ) from error


def _parts(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each layer, and before them those of none."""
    parts: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in state.items():
        found = _LAYER.match(name)
        parts.setdefault(found[0] if found else "", {})[name] = tensor
    yield from parts.values()
