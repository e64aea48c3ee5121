from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.errors import CalibrationError
from sparseserve.testing import tiny_tokenizer
from sparseserve.text import TextSource, calibration_windows
from sparseserve.text.held_out import held_out_count, held_out_windows, spread_places
from sparseserve.text.windows import token_stream

TOKENIZER = tiny_tokenizer()
# No eight letters occur twice, so a window has one place.
SOURCE = TextSource("numbers", ("".join(f"{i:05d}," for i in range(300)),), ())


def places(windows: list[torch.Tensor]) -> list[set[int]]:
    tokens = token_stream(TOKENIZER, SOURCE).tokens
    strided = tokens.unfold(0, len(windows[0]), 1)
    starts = [(strided == window).all(dim=1).nonzero().flatten().tolist() for window in windows]
    assert all(len(found) == 1 for found in starts)
    return [set(range(start, start + len(windows[0]))) for (start,) in starts]


def held_out(used: Sequence[Tensor], samples: int, length: int) -> list[Tensor]:
    return held_out_windows(
        TOKENIZER,
        SOURCE,
        used=used,
        samples=samples,
        sequence_length=length,
        purpose="judge",
        remedy="wait",
    )


@settings(max_examples=25)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 12))
def test_windows_share_no_place_with_used_ones_or_each_other(
    seed: int, used_count: int, samples: int
) -> None:
    used = calibration_windows(TOKENIZER, SOURCE, samples=used_count, sequence_length=32, seed=seed)
    found = held_out(used, samples, 16)
    assert len(found) == samples
    taken = places(used)
    for own in places(found):
        assert all(not own & other for other in taken)
        taken.append(own)


def test_windows_of_another_text_take_no_place() -> None:
    other = [torch.arange(32) + 100]
    found = held_out(other, 50, 32)
    assert torch.equal(found[0], token_stream(TOKENIZER, SOURCE).tokens[:32])


def test_a_text_that_calibration_used_up_is_refused_with_the_remedy() -> None:
    used = [token_stream(TOKENIZER, SOURCE).tokens]
    with pytest.raises(
        CalibrationError, match=r"0 windows of 32 tokens outside.*needed to judge:.*or wait"
    ):
        held_out(used, 1, 32)


@pytest.mark.parametrize(
    ("share", "total", "count"), [(0.125, 256, 32), (0.125, 3, 1), (0.5, 7, 4)]
)
def test_a_share_of_windows_is_at_least_one(share: float, total: int, count: int) -> None:
    assert held_out_count(share, total) == count


@pytest.mark.parametrize(("count", "total"), [(1, 9), (3, 9), (4, 36), (9, 9)])
def test_spread_places_lie_in_the_middle_of_equal_parts(count: int, total: int) -> None:
    places = spread_places(count, total)
    assert len(set(places)) == count
    for part, place in enumerate(places):
        assert abs(place + 0.5 - (part + 0.5) * total / count) <= 0.5
