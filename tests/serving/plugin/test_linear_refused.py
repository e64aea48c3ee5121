"""What a layer cannot be loaded from is refused by name."""

from __future__ import annotations

import pytest
import torch

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.errors import ServingError
from tests.serving.parallel_ranks import (
    PARENT,
    Ranks,
    dense_method_config,
    finish,
    load_dense,
    load_packed,
    packed_method_config,
    random_two_four,
)

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.usefixtures("kernels_in_turn"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def test_a_row_parallel_share_that_cuts_a_byte_of_indices_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    for _ in Ranks(monkeypatch, 2):
        with pytest.raises(ServingError, match=r"down_proj: 24 input features.* 2, give 12.* 8"):
            RowParallelLinear(
                24, 16, quant_config=packed_method_config("down_proj"), prefix=f"{PARENT}.down_proj"
            )


@pytest.mark.parametrize("missing", ["weight", "weight_indices"])
def test_a_packed_tensor_that_was_not_in_the_checkpoint_is_refused(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = MergedColumnParallelLinear(
            32,
            [24, 24],
            quant_config=packed_method_config("gate_proj", "up_proj"),
            prefix=f"{PARENT}.gate_up_proj",
        )
        load_packed(layer, random_two_four(24, 32), 0)
        other = {"weight": "weight_indices", "weight_indices": "weight_values"}[missing]
        packed = pack24(random_two_four(24, 32, seed=1))
        tensor = packed.values if other == "weight_values" else packed.indices
        getattr(layer, other).weight_loader(getattr(layer, other), tensor, 1)
        with pytest.raises(ServingError, match=rf"up_proj\.{missing} is missing"):
            finish(layer)


def test_a_dense_module_of_a_packed_layer_that_was_not_loaded_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = MergedColumnParallelLinear(
            32,
            [24, 24],
            quant_config=packed_method_config("up_proj"),
            prefix=f"{PARENT}.gate_up_proj",
        )
        load_packed(layer, random_two_four(24, 32), 1)
        with pytest.raises(ServingError, match=r"gate_proj\.weight is missing"):
            finish(layer)


def test_indices_that_do_not_ascend_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    packed = pack24(random_two_four(24, 32))
    packed.indices[3, 2] = 0b0101_0101
    for _ in Ranks(monkeypatch, 1):
        layer = ColumnParallelLinear(
            32, 24, quant_config=packed_method_config("up_proj"), prefix=f"{PARENT}.up_proj"
        )
        layer.weight_values.weight_loader(layer.weight_values, packed.values)
        layer.weight_indices.weight_loader(layer.weight_indices, packed.indices)
        with pytest.raises(ServingError, match=r"up_proj\.weight_indices: .*row 3, group 4"):
            finish(layer)


def test_a_dense_weight_that_is_not_two_four_is_refused_by_module_and_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    wrong = random_two_four(24, 32)
    wrong[5, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    for _ in Ranks(monkeypatch, 1):
        layer = MergedColumnParallelLinear(
            32, [24, 24], quant_config=dense_method_config(), prefix=f"{PARENT}.gate_up_proj"
        )
        load_dense(layer, random_two_four(24, 32), 0)
        load_dense(layer, wrong, 1)
        with pytest.raises(
            ServingError, match=r"up_proj\.weight is not 2:4: row 5, columns from 8: 3 non-zeros"
        ):
            finish(layer)


def test_a_dense_weight_that_was_not_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = RowParallelLinear(
            24, 16, quant_config=dense_method_config(), prefix=f"{PARENT}.down_proj"
        )
        with pytest.raises(ServingError, match=r"down_proj\.weight is missing"):
            finish(layer)


def test_half_packed_modules_without_rows_of_their_own_are_refused() -> None:
    from sparseserve.serving.plugin.shards import CheckpointModule, shards_of

    modules = (CheckpointModule("a.x", True), CheckpointModule("a.y", False))
    with pytest.raises(ServingError, match=r"a\.xy: some of its 2 modules are packed"):
        shards_of("a.xy", modules, [8, 8, 8])
