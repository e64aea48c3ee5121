"""A layer whose values are rotated is the dense layer in another basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseserve.layerwise.head_rotation import rotated_heads
from sparseserve.layerwise.layer import prune_layer
from sparseserve.layerwise.preparation import Preparation
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.streams import HiddenStreams, LayerContext
from sparseserve.models.layers import (
    capture_layer_calls,
    entering_states,
    group_input,
    run_layer,
)
from sparseserve.models.structure import OperatorGroup, trace_structure
from sparseserve.models.value_heads import ValueHeads, find_value_heads
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model

CPU = torch.device("cpu")
UNTRAINED = PruneRecipe(
    error_correction="intra", reconstruction=Reconstruction(epochs=0), rotate="heads"
)


def first_layer(
    folder: Path, family: str, *, keep_inputs: bool
) -> tuple[LayerContext, tuple[ValueHeads, ...]]:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 256, (24,), generator=generator) for _ in range(6)]
    structure = trace_structure(model, texts[0])
    calls = capture_layer_calls(model, structure, texts)
    entering = entering_states(model, structure, texts)
    streams = HiddenStreams.start(
        folder / "streams", entering, dense=True, chained=False, keep_inputs=keep_inputs
    )
    layer = structure.layers[0]
    context = streams.enter(model.get_submodule(layer.name), layer, calls[0], CPU)
    return context, find_value_heads(model, structure, texts[0][:8])[0]


def reader_of(context: LayerContext, heads: ValueHeads) -> OperatorGroup:
    return next(group for group in context.layer.groups if heads.outputs in group.operators)


@pytest.mark.parametrize("keep_inputs", [True, False], ids=["kept", "run again"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_it_computes_the_same_and_its_reader_sees_the_rotated_values(
    tmp_path: Path, family: str, keep_inputs: bool
) -> None:
    context, heads = first_layer(tmp_path, family, keep_inputs=keep_inputs)
    files = sorted(tmp_path.rglob("*"))
    with rotated_heads(context, heads, context.layer.operators, TWO_FOUR) as rotated:
        (report,) = rotated.reports
        assert report.loss_after < report.loss_before
        module, group = rotated.context.module, reader_of(context, heads[0])
        seen = list(rotated.context.dense_group_inputs(group))
        before = list(context.dense_group_inputs(group))
        windows = context.windows(context.entering)
        for (window, call), inputs, dense in zip(windows, seen, before, strict=True):
            torch.testing.assert_close(
                run_layer(module, window, call), run_layer(context.module, window, call)
            )
            torch.testing.assert_close(inputs, group_input(module, window, call, group))
            assert not torch.allclose(inputs, dense, atol=1e-2)
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("left", ["v_proj", "o_proj"])
def test_where_an_operator_stays_dense_nothing_is_rotated(tmp_path: Path, left: str) -> None:
    context, heads = first_layer(tmp_path, "llama", keep_inputs=True)
    planned = [operator for operator in context.layer.operators if left not in operator.name]
    with rotated_heads(context, heads, planned, TWO_FOUR) as rotated:
        assert rotated.context is context
        assert rotated.reports == ()


def test_the_pruned_layer_holds_all_that_was_rotated(tmp_path: Path) -> None:
    context, heads = first_layer(tmp_path, "qwen2", keep_inputs=True)
    pruned = prune_layer(context, UNTRAINED, PruneProgress(), None, Preparation(heads))
    # Biases of values are turned with them; no other bias changes without training.
    (bias,) = (name for name in pruned.parameters if name.endswith("bias"))
    assert bias == "self_attn.v_proj.bias"
    dense = context.module.get_parameter(bias)
    turned = pruned.parameters[bias].reshape(heads[0].heads, -1)
    torch.testing.assert_close(turned.norm(dim=-1), dense.reshape(heads[0].heads, -1).norm(dim=-1))
    assert not torch.allclose(turned.flatten(), dense, atol=1e-3)
    assert [report.outputs for report in pruned.report.rotations] == [
        context.layer.full_name(heads[0].outputs)
    ]
