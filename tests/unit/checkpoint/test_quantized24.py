"""Quantised 2:4 weights: stored, read back, and refused where they are not what the format has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24, unpack24
from sparseserve.checkpoint.quantization import Quantization, rounded, scales_of
from sparseserve.checkpoint.quantized24 import (
    Quantized24,
    check_canonical,
    from_stored,
    missing_tensor,
    not_loaded,
    quantized24,
    stored_parts,
)
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR
from tests.unit.checkpoint.test_quantization import ROUNDING
from tests.unit.two_four import two_four_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Parts = dict[str, Tensor]


@pytest.fixture(params=ROUNDING)
def how(request: pytest.FixtureRequest) -> Quantization:
    return Quantization(to=request.param)


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    made = TWO_FOUR.project(torch.randn(6, 192))
    made[1], made[2, :64] = 0, 0
    return made


def loaded(parts: Parts, dtype: torch.dtype = torch.float32) -> Quantized24:
    return from_stored(parts["weight"], parts["weight_indices"], parts["weight_scale"], dtype)


def read(parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
    return unpack24(loaded(parts, dtype).dequantized())


@pytest.mark.parametrize("kind", ROUNDING)
@settings(max_examples=100)
@given(weight=two_four_weights(), dtype=st.sampled_from(DTYPES))
def test_what_is_stored_is_each_weight_rounded_to_its_nearest_code(
    kind: str, weight: Tensor, dtype: torch.dtype
) -> None:
    weight, how = weight.to(dtype), Quantization(to=kind)
    parts = stored_parts(quantized24(weight, how), how)
    expected = rounded(weight, scales_of(weight, how), how).to(dtype)
    found = read(parts, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not found[found == 0].signbit().any()
    check_canonical(loaded(parts, dtype), kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_weight_and_its_scales_give_the_stored_tensors_again(
    how: Quantization, weight: Tensor, dtype: torch.dtype
) -> None:
    first = quantized24(weight.to(dtype), how)
    parts = stored_parts(first, how)
    again = stored_parts(quantized24(read(parts, dtype), how, first.scale), how)
    for name, tensor in parts.items():
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_weight_that_is_not_rounded_is_refused_with_scales(
    how: Quantization, weight: Tensor
) -> None:
    scale = scales_of(weight, how)
    with pytest.raises(ArtifactError, match=f"is not {how.to} codes times its scale"):
        quantized24(weight, how, scale)


def test_a_code_that_rounds_to_zero_gives_its_place_away() -> None:
    parts = stored_parts(
        quantized24(torch.tensor([[0.0, 0, 1e-9, 1.0]]), Quantization(to="int8")),
        Quantization(to="int8"),
    )
    # Kept are the only code, at place 3, and the lowest free place.
    assert parts["weight"].tolist() == [[0, 127]]
    assert parts["weight_indices"].tolist() == [[0 | 3 << 2]]


def test_four_bits_lie_two_in_a_byte_the_first_in_the_low_half() -> None:
    how = Quantization(to="int4")
    parts = stored_parts(quantized24(torch.tensor([[7.0, 0, -3, 0, 0, 1, 0, 0]]), how), how)
    assert parts["weight"].tolist() == [[(7 + 8) | (-3 + 8) << 4, 8 | (1 + 8) << 4]]
    assert parts["weight_scale"].tolist() == [[1.0]]


def test_bits_a_weight_are_what_the_documents_say() -> None:
    weight = TWO_FOUR.project(torch.randn(64, 4096))
    for kind, bits in {"int8": 5 + 32 / 4096, "fp8": 5 + 32 / 4096, "int4": 3 + 16 / 64}.items():
        how = Quantization(to=kind)
        parts = stored_parts(quantized24(weight, how), how)
        assert sum(part.nbytes for part in parts.values()) * 8 == weight.numel() * bits


Change = Callable[[Parts], object]


def _wrong_position(parts: Parts) -> None:
    parts["weight_indices"][1] += 4  # of a group of zeros: places 0 and 2 in place of 0 and 1


DAMAGE: dict[str, tuple[str, Change, str]] = {
    "a code below the range": ("int8", lambda p: p["weight"][0].fill_(-128), "beyond 127"),
    "half a byte that is no code": ("int4", lambda p: p["weight"][0].fill_(0), "beyond 7"),
    "a code that is NaN": ("fp8", lambda p: p["weight"][0].fill_(torch.nan), "NaN or beyond 448"),
    "a negative zero": ("fp8", lambda p: p["weight"][1].fill_(-0.0), "not the canonical one"),
    "a place that holds nothing": ("int8", _wrong_position, "not the canonical one"),
    "a scale of zero": ("int8", lambda p: p["weight_scale"][0].fill_(0), "not positive"),
    "an infinite scale": ("fp8", lambda p: p["weight_scale"][0].fill_(torch.inf), "not positive"),
    "a scale nobody needs": ("int4", lambda p: p["weight_scale"][1].fill_(2), "not 1 where all"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_no_weight_gives_is_damage(weight: Tensor, name: str) -> None:
    kind, change, message = DAMAGE[name]
    how = Quantization(to=kind)
    parts = {key: part.clone() for key, part in stored_parts(quantized24(weight, how), how).items()}
    change(parts)
    with pytest.raises(ArtifactError, match=message):
        check_canonical(loaded(parts), kind)


def test_scales_that_do_not_fit_the_codes_are_refused(how: Quantization, weight: Tensor) -> None:
    values, indices, scale = stored_parts(quantized24(weight, how), how).values()
    for wrong in (scale[:-1], scale.repeat(1, 5), scale[0]):
        with pytest.raises(ArtifactError, match="does not fit codes"):
            from_stored(values, indices, wrong, torch.float32)


def test_what_was_not_loaded_is_told_from_what_was(how: Quantization, weight: Tensor) -> None:
    parts = stored_parts(quantized24(weight, how), how)
    rows, columns = weight.shape
    assert missing_tensor(*parts.values()) is None
    for name, tensor in not_loaded(rows, columns, columns, how).items():
        assert tensor.shape == parts[name].shape
        assert tensor.dtype == parts[name].dtype
        assert missing_tensor(*{**parts, name: tensor}.values()) == name


def test_a_share_of_the_inputs_has_its_share_of_the_scales() -> None:
    how = Quantization(to="int4")
    assert not_loaded(8, 128, 256, how)["weight_scale"].shape == (8, 2)
    assert not_loaded(8, 128, 256, Quantization(to="int8"))["weight_scale"].shape == (8, 1)
    with pytest.raises(ArtifactError, match="96 of 192 input features cut a group of 64"):
        not_loaded(8, 96, 192, how)


def test_codes_are_packed_as_values_are(weight: Tensor) -> None:
    how = Quantization(to="int8")
    found = quantized24(weight, how)
    packed = pack24(rounded(weight, scales_of(weight, how), how) / found.scale)
    assert torch.equal(found.codes.indices, packed.indices)
    assert torch.equal(found.codes.values.float(), packed.values.round())
