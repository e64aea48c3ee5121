"""A tiny pruned model to retrain, and knobs that take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseserve.models.structure import trace_structure
from sparseserve.report import RetrainReport
from sparseserve.retraining.losses import DensePrediction, dense_predictions
from sparseserve.retraining.retrain import retrain
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model

QUICK = Retraining(rank=4, learning_rate=3e-3, epochs=2, batch=2, distillation=1.0, likeliest=32)


@dataclass(frozen=True)
class Pruned:
    """A tiny model cut to 2:4 by magnitude, and what its dense self predicts."""

    model: PreTrainedModel
    operators: list[str]
    windows: list[Tensor]
    dense: Sequence[DensePrediction]

    def retrained(self, knobs: Retraining) -> RetrainReport:
        return retrain(self.model, self.operators, self.windows, knobs, dense=self.dense)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32) -> Pruned:
    return prune(tiny_model(family).to(dtype))


def prune(model: PreTrainedModel) -> Pruned:
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randint(0, 64, (32,), generator=generator) for _ in range(6)]
    dense = tuple(dense_predictions(model, windows, QUICK.likeliest))
    operators = []
    for layer in trace_structure(model, windows[0]).layers:
        for operator in layer.operators:
            operators.append(layer.full_name(operator))
            weight = model.get_submodule(operators[-1]).get_parameter("weight")
            stored = weight.data.T if operator.transposed else weight.data
            stored.copy_(TWO_FOUR.project(stored))
    return Pruned(model, operators, windows, dense)


def bits(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()
