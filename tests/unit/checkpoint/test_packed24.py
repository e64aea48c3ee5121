"""Packing against its specification, and what the owner of the format says of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.packed24 import Packed24, pack24, unpack24
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR
from tests.unit.two_four import two_four_weights


@settings(max_examples=200)
@given(two_four_weights())
def test_packing_and_unpacking_give_the_same_bits(weight: torch.Tensor) -> None:
    restored = unpack24(pack24(weight))
    expected = weight + 0.0
    assert torch.equal(restored.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=200)
@given(two_four_weights())
def test_every_group_takes_the_code_that_the_format_prescribes(weight: torch.Tensor) -> None:
    packed = pack24(weight)
    for row in range(len(weight)):
        for group in range(weight.shape[1] // 4):
            cells = weight[row, 4 * group : 4 * group + 4].tolist()
            taken = [place for place in range(4) if cells[place] != 0]
            free = [place for place in range(4) if cells[place] == 0]
            first, second = sorted((taken + free[: 2 - len(taken)])[:2])
            half = int(packed.indices[row, group // 2]) >> (4 * (group % 2)) & 15
            assert half == first | second << 2
            stored = packed.values[row, 2 * group : 2 * group + 2].tolist()
            assert stored == [cells[first], cells[second]]
            assert not any(torch.tensor(stored).signbit() & (torch.tensor(stored) == 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_size_is_nine_sixteenths_of_sixteen_bits(dtype: torch.dtype) -> None:
    weight = TWO_FOUR.project(torch.randn(16, 64)).to(dtype)
    packed = pack24(weight)
    assert packed.values.dtype == dtype
    assert packed.values.nbytes * 2 == weight.nbytes
    assert packed.indices.nbytes * 16 == weight.numel() * 2


def test_a_width_of_four_modulo_eight_leaves_a_zero_half_byte() -> None:
    packed = pack24(torch.tensor([[0.0, 0.0, 1.0, 2.0]]))
    assert packed.indices.tolist() == [[2 | 3 << 2]]


def test_a_weight_may_lie_in_memory_in_any_order() -> None:
    weight = TWO_FOUR.project(torch.randn(24, 40))
    expected = pack24(weight)
    for turned in (weight.T.contiguous().T, torch.stack((weight, weight), dim=-1)[..., 0]):
        found = pack24(turned)
        assert not turned.is_contiguous()
        assert torch.equal(found.values, expected.values)
        assert torch.equal(found.indices, expected.indices)


def test_packing_refuses_a_weight_that_is_not_two_four() -> None:
    with pytest.raises(ArtifactError, match="not 2:4 at row 0, columns from 4: 3 non-zeros"):
        pack24(torch.tensor([[0.0, 0, 0, 0, 1, 2, 3, 0]]))


def test_unpacking_refuses_positions_that_do_not_ascend() -> None:
    with pytest.raises(ArtifactError, match="row 1, group 1 do not ascend"):
        unpack24(Packed24(torch.ones(2, 4), torch.tensor([[0x44], [0x14]], dtype=torch.uint8)))


def test_unpacking_refuses_bits_in_the_padding() -> None:
    with pytest.raises(ArtifactError, match="padding"):
        unpack24(Packed24(torch.ones(1, 2), torch.tensor([[0x44]], dtype=torch.uint8)))


def test_indices_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"need uint8 indices \(2, 1\)"):
        Packed24(torch.ones(2, 4), torch.zeros(2, 2, dtype=torch.uint8))


def test_what_config_json_says_is_read_back() -> None:
    modules = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    config = packed24.quantization_config(modules, torch.bfloat16)
    assert packed24.packed_modules(config) == frozenset(modules)
    assert config["quant_method"] == "sparseserve"
    for key in ("version", "format", "pattern", "modules"):
        with pytest.raises(ArtifactError, match=key):
            packed24.packed_modules({**config, key: "other"})


@settings(max_examples=50)
@given(two_four_weights(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_what_was_never_loaded_is_told_from_every_packed_weight(
    weight: torch.Tensor, dtype: torch.dtype
) -> None:
    packed = pack24(weight.to(dtype))
    rows, columns = weight.shape
    empty = packed24.not_loaded(rows, columns, dtype)
    assert empty.values.shape == packed.values.shape
    assert empty.indices.shape == packed.indices.shape
    assert packed24.missing_tensor(packed) is None
    assert packed24.missing_tensor(Packed24(empty.values, packed.indices)) == "weight"
    assert packed24.missing_tensor(Packed24(packed.values, empty.indices)) == "weight_indices"


@given(two_four_weights())
@pytest.mark.parametrize("values", ["weight", "weight_values"])
def test_the_dense_shape_is_told_from_names_and_shapes_alone(
    values: str, weight: torch.Tensor
) -> None:
    packed = pack24(weight)
    stored = {f"layer.{values}", "layer.weight_indices", "layer.bias", "norm.weight"}
    rows, kept = packed.values.shape
    for shape, dtype in (((rows, kept), "F32"), ((rows, kept), "I8"), ((rows, kept // 2), "U8")):
        dense = packed24.dense_shape(f"layer.{values}", shape, dtype, stored)
        assert dense == tuple(weight.shape)
    for leaf in ("weight_indices", "weight_scale"):
        assert packed24.dense_shape(f"layer.{leaf}", (rows, 1), "U8", stored) == (0,)
    assert packed24.dense_shape("layer.bias", (7,), "F32", stored) == (7,)
    assert packed24.dense_shape("norm.weight", (8,), "F32", stored) == (8,)
