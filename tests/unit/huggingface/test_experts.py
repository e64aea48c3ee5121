"""Experts as linear operators compute what transformers computes, on the model's own weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseserve.huggingface.experts import (
    experts_in,
    recorded_routing,
    replayed_routing,
    routers_in,
    unstacked_experts,
)
from sparseserve.testing import EXPERT_TINY_FAMILIES, tiny_model

TOKENS = torch.arange(10, 42)[None]


@pytest.mark.parametrize("family", EXPERT_TINY_FAMILIES)
def test_unstacked_experts_give_the_logits_of_stacked_ones(family: str) -> None:
    model = tiny_model(family)
    expected = model(TOKENS, use_cache=False).logits
    names = list(model.state_dict())
    with unstacked_experts(model):
        found = model(TOKENS, use_cache=False).logits
        assert experts_in(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not experts_in(model)


@pytest.mark.parametrize("family", EXPERT_TINY_FAMILIES)
def test_what_is_written_into_one_linear_changes_that_part_of_the_stack_alone(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with unstacked_experts(model):
        [*_, experts] = experts_in(model).values()
        linear = experts.get_submodule("2.up_proj")
        assert isinstance(linear, nn.Linear)
        linear.weight.detach().zero_()
    changed = {
        name: tensor != before[name]
        for name, tensor in model.state_dict().items()
        if not tensor.equal(before[name])
    }
    [where] = changed.values()
    assert int(where.sum()) == linear.weight.numel()
    assert where[2].any()
    assert not where[[0, 1, 3]].any()


@pytest.mark.parametrize("family", EXPERT_TINY_FAMILIES)
def test_every_layer_of_experts_has_one_router(family: str) -> None:
    model = tiny_model(family)
    with unstacked_experts(model):
        owners = {name.rpartition(".")[0] for name in experts_in(model)}
        assert {name.rpartition(".")[0] for name in routers_in(model)} == owners
        assert len(routers_in(model)) == len(owners)


@pytest.mark.parametrize("family", EXPERT_TINY_FAMILIES)
def test_a_replayed_routing_overrules_the_router(family: str) -> None:
    model = tiny_model(family)
    with unstacked_experts(model):
        with recorded_routing(model) as routing:
            expected = model(TOKENS, use_cache=False).logits
        for name in routers_in(model):
            router = model.get_submodule(name)
            for parameter in router.parameters():
                parameter.neg_()
        assert not torch.allclose(model(TOKENS, use_cache=False).logits, expected, atol=1e-3)
        with replayed_routing(model, routing):
            found = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
