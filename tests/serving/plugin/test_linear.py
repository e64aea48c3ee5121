"""Each rank's layer is loaded by vLLM's own weight loaders and multiplied with the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseserve.errors import ServingError
from tests.serving.parallel_ranks import (
    MERGED,
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


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_column_parallel_ranks_make_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    weight = random_two_four(24, 32)
    parts = []
    for _ in Ranks(monkeypatch, size):
        layer = ColumnParallelLinear(
            32, 24, quant_config=packed_method_config("up_proj"), prefix=f"{PARENT}.up_proj"
        )
        load_packed(layer, weight)
        parts.append(finish(layer))
    assert torch.equal(torch.cat(parts), weight)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_row_parallel_ranks_make_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = random_two_four(16, 96)
    parts = []
    for _ in Ranks(monkeypatch, size):
        layer = RowParallelLinear(
            96, 16, quant_config=packed_method_config("down_proj"), prefix=f"{PARENT}.down_proj"
        )
        load_packed(layer, weight)
        parts.append(finish(layer))
    assert torch.equal(torch.cat(parts, dim=1), weight)


def test_an_uncut_layer_may_end_in_half_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = random_two_four(8, 12)
    for _ in Ranks(monkeypatch, 1):
        layer = RowParallelLinear(
            12, 8, quant_config=packed_method_config("down_proj"), prefix=f"{PARENT}.down_proj"
        )
        load_packed(layer, weight)
        assert torch.equal(finish(layer), weight)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("packed", [("gate_proj", "up_proj"), ("up_proj",), ("gate_proj",)])
def test_merged_ranks_make_both_weights(
    monkeypatch: pytest.MonkeyPatch, size: int, packed: tuple[str, ...]
) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    weights = {name: random_two_four(24, 32, seed) for seed, name in enumerate(MERGED_NAMES)}
    weights = {
        name: weight if name in packed else torch.randn(24, 32) for name, weight in weights.items()
    }
    parts: dict[str, list[Tensor]] = {name: [] for name in weights}
    for _ in Ranks(monkeypatch, size):
        layer = MergedColumnParallelLinear(
            32,
            [24, 24],
            quant_config=packed_method_config(*packed),
            prefix=f"{PARENT}.gate_up_proj",
        )
        for shard, (name, weight) in enumerate(weights.items()):
            (load_packed if name in packed else load_dense)(layer, weight, shard)
        for name, part in zip(weights, finish(layer).chunk(2), strict=True):
            parts[name].append(part)
    for name, weight in weights.items():
        assert torch.equal(torch.cat(parts[name]), weight)


MERGED_NAMES = MERGED["gate_up_proj"]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("packed", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_qkv_ranks_make_all_weights_with_key_value_heads_replicated(
    monkeypatch: pytest.MonkeyPatch, size: int, packed: tuple[str, ...]
) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    heads, key_value_heads, width, columns = 4, 2, 8, 32
    rows = {"q_proj": heads * width, "k_proj": key_value_heads * width}
    rows["v_proj"] = rows["k_proj"]
    weights = {
        name: random_two_four(count, columns, seed) if name in packed else torch.randn(count, 32)
        for seed, (name, count) in enumerate(rows.items())
    }
    found = []
    for _ in Ranks(monkeypatch, size):
        layer = QKVParallelLinear(
            columns,
            width,
            heads,
            key_value_heads,
            quant_config=packed_method_config(*packed),
            prefix=f"{PARENT}.qkv_proj",
        )
        for name, weight in weights.items():
            (load_packed if name in packed else load_dense)(layer, weight, name[0])
        found.append(torch.split(finish(layer), layer.output_partition_sizes))
    replicas = max(1, size // key_value_heads)
    assert torch.equal(torch.cat([rank[0] for rank in found]), weights["q_proj"])
    assert torch.equal(torch.cat([rank[1] for rank in found[::replicas]]), weights["k_proj"])
    assert torch.equal(torch.cat([rank[2] for rank in found[::replicas]]), weights["v_proj"])
    for index in range(size):
        assert torch.equal(found[index][1], found[index // replicas * replicas][1])


@pytest.mark.parametrize("size", [1, 2])
def test_weights_stored_merged_are_cut_like_separate_ones(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    weight = random_two_four(64, 32)
    found = []
    for _ in Ranks(monkeypatch, size):
        layer = QKVParallelLinear(
            32, 8, 4, 2, quant_config=packed_method_config("qkv_proj"), prefix=f"{PARENT}.qkv_proj"
        )
        load_packed(layer, weight)
        found.append(torch.split(finish(layer), layer.output_partition_sizes))
    whole = torch.cat([torch.cat(parts) for parts in zip(*found, strict=True)])
    assert torch.equal(whole, weight)


def test_the_bias_is_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    weight, bias, inputs = random_two_four(24, 32), torch.randn(24), torch.randn(5, 32)
    for _ in Ranks(monkeypatch, 1):
        layer = ColumnParallelLinear(
            32, 24, quant_config=packed_method_config("up_proj"), prefix=f"{PARENT}.up_proj"
        )
        load_packed(layer, weight)
        layer.bias.weight_loader(layer.bias, bias)
        finish(layer)
        output, _ = layer(inputs)
    torch.testing.assert_close(output, inputs @ weight.T + bias)


@pytest.mark.parametrize("size", [1, 2])
def test_a_dense_two_four_weight_is_loaded_as_it_is(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = random_two_four(16, 24)
    parts = []
    for _ in Ranks(monkeypatch, size):
        layer = RowParallelLinear(
            24, 16, quant_config=dense_method_config(), prefix=f"{PARENT}.down_proj"
        )
        load_dense(layer, weight)
        parts.append(finish(layer))
    assert torch.equal(torch.cat(parts, dim=1), weight)


@pytest.mark.parametrize("two_four", [True, False])
def test_what_the_model_loads_in_its_own_way_is_packed_if_it_is_two_four(
    monkeypatch: pytest.MonkeyPatch, two_four: bool
) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    weight = random_two_four(24, 32) if two_four else torch.randn(24, 32)

    def backwards(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(loaded.flip(0))

    for _ in Ranks(monkeypatch, 1):
        layer = ColumnParallelLinear(
            32, 24, quant_config=packed_method_config("up_proj"), prefix=f"{PARENT}.up_proj"
        )
        method = layer.quant_method
        assert not method.is_loaded_by_the_model(layer)
        layer.weight.weight_loader = backwards
        assert method.is_loaded_by_the_model(layer)
        method.let_the_model_load(layer)
        load_dense(layer, weight)
        assert torch.equal(finish(layer), weight.flip(0))
        assert (layer.quant_method.kernels is not None) == two_four


def test_a_weight_that_the_model_should_load_and_the_files_lack_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = ColumnParallelLinear(
            32, 24, quant_config=packed_method_config("up_proj"), prefix=f"{PARENT}.up_proj"
        )
        layer.quant_method.let_the_model_load(layer)
        with pytest.raises(ServingError, match=rf"{PARENT}\.up_proj\.weight"):
            finish(layer)
