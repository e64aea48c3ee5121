"""The layouts of tensors that hold all experts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.checkpoint.stacks import ExpertStack, stacks_from_json, stacks_to_json
from sparseserve.errors import ArtifactError

LAYOUT = {"experts": 4, "projections": ["up"], "interleaved": False, "transposed": True}

stacks = st.builds(
    ExpertStack,
    owner=st.sampled_from(["model.layers.0.mlp.experts", "experts"]),
    leaf=st.sampled_from(["gate_up_proj", "weight"]),
    experts=st.integers(1, 5),
    projections=st.sampled_from([("gate", "up"), ("down",)]),
    interleaved=st.booleans(),
    transposed=st.booleans(),
)


@given(stacks, st.integers(1, 4), st.integers(1, 4))
def test_every_entry_of_a_stack_belongs_to_one_weight(
    stack: ExpertStack, rows: int, columns: int
) -> None:
    whole = stack.empty(torch.empty(rows, columns, dtype=torch.int64)).fill_(-1)
    for number, module in enumerate(stack.modules):
        weight = stack.weight(whole, *stack.place(module))
        assert weight.shape == (rows, columns)
        assert (weight == -1).all()
        weight.fill_(number)
    assert set(whole.flatten().tolist()) == set(range(len(stack.modules)))


@given(stacks)
def test_a_stack_holds_the_modules_that_it_names_and_no_others(stack: ExpertStack) -> None:
    assert all(stack.holds(module) for module in stack.modules)
    others = (
        f"{stack.owner}.{stack.experts}.up",
        f"{stack.owner}.0.x",
        "up",
        f"a{stack.owner}.0.up",
    )
    assert not any(stack.holds(name) for name in others)


@given(st.lists(stacks, unique_by=lambda stack: stack.tensor))
def test_layouts_come_back_from_json(several: list[ExpertStack]) -> None:
    data = json.loads(json.dumps(stacks_to_json(tuple(several))))
    assert stacks_from_json("here", data) == tuple(several)


@pytest.mark.parametrize(
    "damaged",
    [
        {**LAYOUT, "experts": 0},
        {**LAYOUT, "experts": True},
        {**LAYOUT, "experts": 10**9},
        {**LAYOUT, "projections": []},
        {**LAYOUT, "projections": ["a", "b", "c"]},
        {**LAYOUT, "projections": ["a.b"]},
        {**LAYOUT, "projections": "up"},
        {**LAYOUT, "transposed": 1},
        {**LAYOUT, "more": 1},
        {"experts": 4},
        None,
    ],
)
def test_a_layout_with_a_wrong_value_is_refused_by_its_name(damaged: object) -> None:
    stacks_from_json("here", {"experts.up": LAYOUT})
    with pytest.raises(ArtifactError, match=r"here: stacks 'experts\.up' is .* no layout"):
        stacks_from_json("here", {"experts.up": damaged})


def test_layouts_that_are_no_object_are_refused() -> None:
    with pytest.raises(ArtifactError, match="here: stacks is 'x', but must be an object"):
        stacks_from_json("here", "x")
