"""Whether an ONNX graph computes what the model does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseserve.errors import ArtifactError
from sparseserve.exporters.onnx.graph import GRAPH_FILE
from sparseserve.huggingface.names import stored_name

if TYPE_CHECKING:
    import onnxruntime

# Of the largest logit. onnxruntime's CPU has no bfloat16.
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3}
_PROMPT, _NEW = 9, 4
_PADDING = 3


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a graph agrees with its model.

    Attributes:
        equal_weights: Products whose weights are the model's, to the bit.
        difference: Largest difference of logits, as a share of the largest logit; None where
            onnxruntime cannot compute in the dtype.
        limit: What ``difference`` may be.
    """

    equal_weights: int
    difference: float | None
    limit: float | None


def compare_with_model(
    folder: Path, weights: Mapping[str, Tensor], model: PreTrainedModel
) -> Agreement:
    """Compare the graph in ``folder``, and its ``weights``, with the ``model`` it was made from.

    A padded prompt and some tokens one by one, all given, go through both. The model computes in
    float32 with its own weights: in float16 it rounds so much itself that there would be nothing
    to compare with (docs/log.md).

    Raises:
        ArtifactError: A weight differs, or logits differ by more than the limit of the dtype.
    """
    equal = _equal_weights(folder, weights, model)
    limit = LIMITS.get(next(model.parameters()).dtype)
    if limit is None:
        return Agreement(equal, None, None)
    difference = _difference(folder, model)
    if not difference <= limit:
        raise ArtifactError(
            f"{folder / GRAPH_FILE}: its logits differ from the model's by {difference:.1e} of the "
            f"largest, more than {limit:.0e}: use --format dense"
        )
    return Agreement(equal, difference, limit)


def teacher_forced(
    session: onnxruntime.InferenceSession, ids: Tensor, mask: Tensor, prompt: int
) -> Tensor:
    """Return the logits ``[batch, tokens, vocabulary]`` of given tokens, as a server computes them.

    Args:
        session: Of a graph of ours.
        ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``, 0 at padding, which is on the left.
        prompt: How many tokens come first, at once; the others follow one by one.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    past = {
        item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), dtype=_numpy(item.type))
        for item in session.get_inputs()
        if item.name.startswith("past_key_values.")
    }
    names = [item.name for item in session.get_outputs()]
    found = []
    ends = range(prompt, ids.shape[1] + 1)
    for start, stop in zip((0, *ends), ends, strict=False):
        inputs = {
            "input_ids": ids[:, start:stop].numpy(),
            "attention_mask": mask[:, :stop].numpy(),
            "position_ids": positions[:, start:stop].numpy(),
        }
        outputs = dict(zip(names, session.run(None, {**inputs, **past}), strict=True))
        found.append(torch.from_numpy(outputs.pop("logits")))
        past = {name.replace("present.", "past_key_values."): t for name, t in outputs.items()}
    return torch.cat(found, dim=1)


def _difference(folder: Path, model: PreTrainedModel) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(folder / GRAPH_FILE), providers=["CPUExecutionProvider"]
    )
    model = copy.deepcopy(model).float()
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, _PROMPT + _NEW), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    found = teacher_forced(session, ids, mask, _PROMPT).float()
    real = mask.bool()
    return float((found - expected)[real].abs().max() / expected[real].abs().max())


def _equal_weights(folder: Path, weights: Mapping[str, Tensor], model: PreTrainedModel) -> int:
    modules = {
        stored_name(model, name): module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2
    }
    equal = 0
    for name, weight in weights.items():
        if name not in modules:
            continue
        own = modules[name].get_parameter("weight")
        own = own if isinstance(modules[name], torch.nn.Linear) else own.T
        if not own.equal(weight):
            raise ArtifactError(f"{folder / GRAPH_FILE}: the weight of {name} is not the model's")
        equal += 1
    return equal


def _numpy(kind: str) -> type[np.floating]:
    return np.float16 if "float16" in kind else np.float32
