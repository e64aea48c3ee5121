"""Rounding to codes and scales, against every code that there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.checkpoint.packed24 import packed_modules, quantization_config
from sparseserve.checkpoint.quantization import (
    KINDS,
    Quantization,
    codes_of,
    read_dtype,
    rounded,
    scales_of,
)
from sparseserve.errors import ArtifactError, RecipeError

ROUNDING = [kind for kind in KINDS if kind != "none"]
FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
CODES = {
    "int8": torch.arange(-127.0, 128),
    "fp8": FLOAT8[FLOAT8.isfinite()],
    "int4": torch.arange(-7.0, 8),
}


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.sampled_from([4, 12, 64, 96, 192]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
    return torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.8) * size


@pytest.mark.parametrize("kind", ROUNDING)
@settings(max_examples=50)
@given(weight=weights())
def test_every_weight_gets_the_nearest_of_all_codes(kind: str, weight: torch.Tensor) -> None:
    how = Quantization(to=kind)
    scales = scales_of(weight, how)
    by_hand = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1).double()
    distances = (weight.double()[..., None] - by_hand[..., None] * CODES[kind].double()).abs()
    found = (weight.double() - codes_of(weight, scales, how).double() * by_hand).abs()
    # A quotient is rounded before its code is chosen: a tie may fall to either side.
    assert bool((found <= distances.amin(dim=-1) + 1e-5 * by_hand).all())


@pytest.mark.parametrize("kind", ROUNDING)
@given(weight=weights())
def test_zeros_stay_zero_and_what_is_rounded_stays_as_it_is(
    kind: str, weight: torch.Tensor
) -> None:
    how = Quantization(to=kind)
    scales = scales_of(weight, how)
    once = rounded(weight, scales, how)
    assert bool((once[weight == 0] == 0).all())
    assert torch.equal(rounded(once, scales, how), once)


@pytest.mark.parametrize(
    ("columns", "asked", "group"),
    [(256, 128, 128), (576, 128, 64), (96, 64, 32), (100, 64, 100), (64, None, 64)],
)
def test_groups_divide_the_inputs_or_are_the_whole_row(
    columns: int, asked: int | None, group: int
) -> None:
    how = Quantization(to="int4", group_size=asked)
    assert how.group_of(columns) == group
    assert scales_of(torch.ones(2, columns), how).shape == (2, columns // group)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_have_a_scale_for_each_row(kind: str) -> None:
    assert scales_of(torch.ones(3, 256), Quantization(to=kind)).shape == (3, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"to": "int9"}, "unknown quantization 'int9': did you mean 'int8'"),
        ({"to": "int8", "group_size": 64}, "group_size 64 is for int4 alone, not for int8"),
        ({"to": "int4", "group_size": 48}, "group_size 48 must be one of 32, 64, 128"),
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantization(**values)


@pytest.mark.parametrize("kind", KINDS)
def test_config_json_says_how_weights_are_rounded(kind: str) -> None:
    how = Quantization(to=kind)
    config = quantization_config(["a"], torch.bfloat16, how)
    assert Quantization.from_config(config) == how
    assert read_dtype(config) == (None if kind == "none" else torch.bfloat16)
    assert packed_modules(config) == {"a"}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"type": "int", "bits": 3, "group_size": 64}},
        {"weights": {"type": "int", "bits": 8, "group_size": 64}},
        {"weights": {"type": "int", "bits": 4, "group_size": True}},
        {"weights": "int8"},
        {"weights": {"type": "int", "bits": 8, "group_size": None, "dtype": "int8"}},
        {"activations": None},
        {"activations": {"type": "int", "bits": 8, "dynamic": False, "strategy": "tensor"}},
    ],
)
def test_a_configuration_of_another_release_is_refused(change: dict[str, Any]) -> None:
    config = quantization_config(["a"], torch.bfloat16, Quantization(to="int8")) | change
    with pytest.raises(ArtifactError, match="which is not read here"):
        packed_modules(config)
