"""Each rank's layer is loaded by vLLM's own weight loaders and multiplied with the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.cpu_library import missing_library
from sparseserve.sparsity import TWO_FOUR, pack24

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PARENT = "model.layers.0.mlp"


@pytest.fixture(autouse=True, params=["dense", "cpu_unpacked,cpu_dense"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test on vLLM's own product and on our kernels."""
    if request.param != "dense" and missing_library() is not None:
        pytest.skip(str(missing_library()))
    monkeypatch.setenv("SPARSESERVE_KERNELS", request.param)


MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def random_two_four(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return TWO_FOUR.project(torch.randn(rows, columns, generator=generator))


class Ranks:
    """Pretends to be one rank after another of a tensor parallel group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.size, self.rank = size, 0
        for module in ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter"):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: self.rank)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)

    def __iter__(self) -> Any:
        for rank in range(self.size):
            self.rank = rank
            yield rank


def packed_method_config(*modules: str) -> Any:
    from sparseserve.serving.config import SparseServeConfig

    config = SparseServeConfig(frozenset(f"{PARENT}.{name}" for name in modules))
    config.packed_modules_mapping = MERGED
    return config


def dense_method_config() -> Any:
    from sparseserve.serving.config import SparseServeConfig

    config = SparseServeConfig()
    config.packed_modules_mapping = MERGED
    return config


def load_packed(layer: Any, weight: Tensor, *shard: Any) -> None:
    packed = pack24(weight)
    for name, tensor in (("weight_values", packed.values), ("weight_indices", packed.indices)):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def load_dense(layer: Any, weight: Tensor, *shard: Any) -> None:
    layer.weight.weight_loader(layer.weight, weight, *shard)


def finish(layer: Any) -> Tensor:
    """Process the layer and return the dense weight ``[out, in]`` that it multiplies with."""
    layer.quant_method.process_weights_after_loading(layer)
    width = layer.input_size_per_partition
    product: Tensor = layer.quant_method.apply(layer, torch.eye(width), None)
    return product.T


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


def test_a_row_parallel_share_that_cuts_a_byte_of_indices_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    for _ in Ranks(monkeypatch, 2):
        with pytest.raises(ServingError, match=r"down_proj: 24 input features.* 2, give 12.* 8"):
            RowParallelLinear(
                24, 16, quant_config=packed_method_config("down_proj"), prefix=f"{PARENT}.down_proj"
            )


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


@pytest.mark.parametrize("missing", ["weight_values", "weight_indices"])
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
        other = {"weight_values": "weight_indices", "weight_indices": "weight_values"}[missing]
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
    from sparseserve.serving.linear import CheckpointModule, shards_of

    modules = (CheckpointModule("a.x", True), CheckpointModule("a.y", False))
    with pytest.raises(ServingError, match=r"a\.xy: some of its 2 modules are packed"):
        shards_of("a.xy", modules, [8, 8, 8])
