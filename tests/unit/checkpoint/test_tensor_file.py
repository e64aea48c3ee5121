"""Hidden states come back from the disk as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.errors import ArtifactError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    windows = [torch.randn(1, 5, 3).to(dtype) for _ in range(4)]
    stored = HiddenStates.write(tmp_path / "states", iter(windows))
    assert len(stored) == 4
    assert all(torch.equal(a, b) for a, b in zip(stored, windows, strict=True))
    assert torch.equal(stored[2], windows[2])


def test_the_first_tensors_can_be_left_out(tmp_path: Path) -> None:
    windows = [torch.full((1, 2, 3), float(number)) for number in range(5)]
    rest = HiddenStates.write(tmp_path / "states", windows).without_first(1).without_first(2)
    assert [float(window[0, 0, 0]) for window in rest] == [3.0, 4.0]
    assert torch.equal(rest[1], windows[4])
    with pytest.raises(IndexError):
        rest[2]


def test_a_tensor_that_was_read_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    stored = HiddenStates.write(tmp_path / "states", [torch.zeros(1, 2, 2)])
    stored[0].fill_(7)
    assert not stored[0].any()


def test_tensors_of_different_shapes_or_none_at_all_are_programming_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="among those of"):
        HiddenStates.write(tmp_path / "a", [torch.zeros(1, 2, 2), torch.zeros(1, 3, 2)])
    with pytest.raises(ValueError, match="no hidden states"):
        HiddenStates.write(tmp_path / "b", [])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing/states"):
        HiddenStates.write(tmp_path / "missing" / "states", [torch.zeros(1, 2, 2)])
