"""Where a checkpoint keeps each weight, compared with the files that transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.huggingface.experts import ExpertLinears, unstacked_experts
from sparseserve.huggingface.names import stored_modules
from sparseserve.models.layer_list import linear_modules
from sparseserve.testing import EXPERT_TINY_FAMILIES, MORE_TINY_FAMILIES, tiny_model

FAMILIES = (*EXPERT_TINY_FAMILIES, *MORE_TINY_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_found_where_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved = Checkpoint.open(tmp_path)
    with unstacked_experts(model):
        weights = {
            name: module.get_parameter("weight").detach() for name, module in linear_modules(model)
        }
        expert_names = {
            f"{owner}.{name}"
            for owner, experts in model.named_modules()
            if isinstance(experts, ExpertLinears)
            for name, _ in linear_modules(experts)
        }
    del weights["lm_head"]
    places = stored_modules(model, list(weights))
    assert places.keys() == weights.keys()
    for name, place in places.items():
        if place.stack is None:
            found = saved.tensor(f"{place.name}.weight")
        else:
            assert place.stack.holds(place.name)
            stack = saved.tensor(place.stack.tensor)
            found = place.stack.weight(stack, *place.stack.place(place.name))
        assert torch.equal(found, weights[name]), name
    stacked = {name for name, place in places.items() if place.stack}
    assert stacked == (expert_names if family in {"gpt_oss", "llama4_text"} else set())
