"""Linears that cannot be pruned as operators stay dense, each with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.structure import DenseMatrix, trace_structure
from sparseserve.testing import TINY_VOCABULARY, tiny_model
from tests.unit.models.chains import TOKENS, WIDTH, Block, Chain, names


def dense(model: Chain) -> list[tuple[DenseMatrix, ...]]:
    return [layer.dense for layer in trace_structure(model.eval(), TOKENS).layers]


class Wide(Block):
    """A layer with another pair of operators, so that not most of it stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.over, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        inner: Tensor = self.back(self.over(super().forward(hidden)))
        return inner


OTHERS = [("over",), ("back",)]


def test_a_linear_called_twice_in_its_layer() -> None:
    class Twice(Wide):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(self.down(self.up(hidden)))

    model = Chain(Twice())
    reason = "is called more than once when the layer runs"
    assert dense(model) == [(DenseMatrix("down", reason), DenseMatrix("up", reason))]
    assert names(trace_structure(model, TOKENS)) == [tuple(OTHERS)]


def test_a_linear_that_its_layer_never_calls() -> None:
    class Idle(Block):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(WIDTH, WIDTH)

    reason = "is not called as a linear when the layer runs"
    assert dense(Chain(Idle(), Block())) == [(DenseMatrix("spare", reason),), ()]


def test_a_linear_called_from_outside_its_layer() -> None:
    class Borrowing(Chain):
        def forward(self, tokens: Tensor) -> Tensor:
            output: Tensor = self.layers[0].get_submodule("up")(super().forward(tokens))
            return output

    model = Borrowing(Wide(), Wide())
    model.head = nn.Linear(WIDTH, WIDTH)
    assert dense(model) == [(DenseMatrix("up", "is called from outside its layer"),), ()]


def test_a_linear_shared_between_layers() -> None:
    model = Chain(Wide(), Wide())
    model.layers[1].up = model.layers[0].up
    assert [layer[0].reason for layer in dense(model)] == [
        "shares its weight with layers.1.up.weight",
        "shares its weight with layers.0.up.weight",
    ]


def test_a_linear_tied_to_the_embedding() -> None:
    model = Chain(Wide())
    model.layers[0].up = nn.Linear(WIDTH, TINY_VOCABULARY)
    model.layers[0].down = nn.Linear(TINY_VOCABULARY, WIDTH)
    model.layers[0].get_submodule("up").weight = model.embedding.weight
    reason = "shares its weight with the embedding embedding"
    assert dense(model) == [(DenseMatrix("up", reason),)]


def test_a_linear_that_sees_other_rows_than_the_tokens() -> None:
    class Halved(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.halves = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

        def forward(self, hidden: Tensor) -> Tensor:
            parts = zip(self.halves, hidden.chunk(2, dim=1), strict=True)
            return super().forward(torch.cat([half(part) for half, part in parts], dim=1))

    reason = "sees 6 rows for 12 tokens"
    assert dense(Chain(Halved())) == [
        (DenseMatrix("halves.0", reason), DenseMatrix("halves.1", reason))
    ]


def test_a_linear_too_small_to_gain_anything() -> None:
    class Gated(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 1)

        def forward(self, hidden: Tensor) -> Tensor:
            gated: Tensor = super().forward(hidden) * self.gate(hidden)
            return gated

    reason = "is 1 x 16, too small to gain anything"
    assert dense(Chain(Gated())) == [(DenseMatrix("gate", reason),)]


def test_a_matrix_that_is_no_linear() -> None:
    class Mixing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.zeros(4, WIDTH))

    assert dense(Chain(Mixing())) == [(DenseMatrix("mix", "is no linear"),)]


def test_layers_of_several_classes_are_found() -> None:
    structure = trace_structure(Chain(Block(), Wide(), Block()), TOKENS)
    own = (("up",), ("down",))
    assert names(structure) == [own, (*own, *OTHERS), own]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (0, "is not called as a linear when the layer runs"),
        (2, "is called more than once when the layer runs"),
    ],
)
def test_experts_that_their_layer_does_not_call_once(calls: int, reason: str) -> None:
    model = tiny_model("mixtral")
    with unstacked_experts(model):
        block = model.get_submodule("model.layers.0.mlp")
        experts = block.get_submodule("experts")
        if calls == 2:

            def call_once_more(_: nn.Module, args: tuple[Tensor]) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])
                chosen = torch.zeros(len(rows), 1, dtype=torch.int64)
                experts(rows, chosen, torch.ones(len(rows), 1))

            block.register_forward_pre_hook(call_once_more)
        else:
            block.__dict__["forward"] = lambda hidden: hidden
        layer = trace_structure(model, TOKENS).layers[0]
    dense = {matrix.name: matrix.reason for matrix in layer.dense}
    of_experts = {name for name in dense if name.startswith("mlp.experts.")}
    assert len(of_experts) == 12
    assert {dense[name] for name in of_experts} == {reason}
    assert all(group.experts is None for group in layer.groups)
