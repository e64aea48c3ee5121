"""The tensors of a model as its checkpoint has them: under other names, taken apart, or merged."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sparseserve.checkpoint.stacks import ExpertStack
from sparseserve.errors import UnsupportedModelError, first_line
from sparseserve.huggingface.experts import expert_stacks

# Up to the number of a layer, or of a block of another part.
_LAYER = re.compile(r"\D*?\.\d+(?=\.)")
# Of an expert. Conversions drop dimensions of 1.
_KEPT_INPUTS = 2


def stored_tensors(
    model: PreTrainedModel, *, first_rows: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``save_pretrained`` would write, one layer after the other.

    transformers converts a model whole, and needs its size in memory where experts are taken apart.
    A layer's tensors hold all that its conversions need.

    Args:
        model: With its weights.
        first_rows: Whether to take only the first row of every matrix, and of a stack of experts
            the first inputs of the first expert: names without bulk.

    Raises:
        UnsupportedModelError: transformers cannot save the model.
    """
    try:
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        stacks = _stacks(model) if first_rows else {}
        for part in _parts(remove_tied_weights_from_state_dict(state, model)):
            chosen = {
                name: _first_row(tensor, stacks.get(name)) if first_rows else tensor
                for name, tensor in part.items()
            }
            yield from sorted(revert_weight_conversion(model, chosen).items())
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{model.config.name_or_path or model.config.model_type}: transformers cannot save "
            f"this model ({first_line(error)}): prune one that it can load and save"
        ) from error


def _stacks(model: PreTrainedModel) -> dict[str, ExpertStack]:
    """Return the layouts of the tensors of ``model`` that hold experts, by name."""
    return {
        stack.tensor: stack
        for name, module in model.named_modules()
        for stack in expert_stacks(name, module)
    }


def _first_row(tensor: Tensor, stack: ExpertStack | None) -> Tensor:
    """Return the first row of a matrix, or little of a stack of experts.

    All outputs of the first expert stay, as conversions part those of merged projections.
    """
    if stack is not None:
        one = tensor[:1]
        return one[:, :_KEPT_INPUTS] if stack.transposed else one[..., :_KEPT_INPUTS]
    return tensor[:1] if tensor.ndim > 1 else tensor


def _parts(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each layer, and before them those of none."""
    parts: dict[str, dict[str, Tensor]] = {"": {}}
    for name, tensor in state.items():
        found = _LAYER.match(name)
        parts.setdefault(found[0] if found else "", {})[name] = tensor
    yield from parts.values()
