"""Names of weights on disk, which are not always those that a model has in memory."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def stored_name(model: PreTrainedModel, module: str) -> str | None:
    """Return the name under which a checkpoint of ``model`` stores the weight of ``module``.

    Most families store it under the module's own name. Others, such as Gemma 3 with its vision
    tower, have names on disk that transformers changes while it reads.

    Returns:
        The name without ``.weight``; None where the weight is stored in another form, such as
        merged with others.
    """
    row = model.get_parameter(f"{module}.weight")[:1]
    found = revert_weight_conversion(model, {f"{module}.weight": row})
    name, tensor = next(iter(found.items()))
    # A sketch of a model has no values to compare, but then nothing was computed either.
    unchanged = tensor.shape == row.shape and (row.is_meta or tensor.equal(row))
    same = len(found) == 1 and name.endswith(".weight") and unchanged
    return name.removesuffix(".weight") if same else None
