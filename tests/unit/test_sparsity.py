"""Patterns against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import RecipeError
from sparseserve.sparsity import (
    TWO_FOUR,
    NMPattern,
    SparsityPattern,
    UnstructuredPattern,
    strictest_pattern,
)
from tests.unit.two_four import two_four_weights


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_best_mask_beats_every_other_mask_of_a_group(keep: int, group: int) -> None:
    scores = torch.rand(3, 4 * group, generator=torch.Generator().manual_seed(keep))
    kept = scores.where(NMPattern(keep, group).best_mask(scores), 0).reshape(-1, group).sum(-1)
    masks = list(itertools.combinations(range(group), keep))
    best = torch.stack([scores.reshape(-1, group)[:, list(mask)].sum(-1) for mask in masks])
    torch.testing.assert_close(kept, best.max(dim=0).values)


def test_ties_go_to_the_lower_columns() -> None:
    assert TWO_FOUR.best_mask(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@given(two_four_weights())
def test_a_projected_weight_has_no_violation(weight: torch.Tensor) -> None:
    assert TWO_FOUR.first_violation(weight) is None


def test_projection_is_the_nearest_two_four_weight() -> None:
    weight = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    candidates = []
    for mask in itertools.combinations(range(4), 2):
        candidate = torch.zeros_like(weight)
        candidate[0, list(mask)] = weight[0, list(mask)]
        candidates.append(float((candidate - weight).norm()))
    assert float((TWO_FOUR.project(weight) - weight).norm()) == pytest.approx(min(candidates))


def test_the_first_violation_is_named_by_row_and_column() -> None:
    weight = torch.zeros(3, 12)
    weight[1, 8:11] = 1
    weight[2, 0:4] = 1
    violation = TWO_FOUR.first_violation(weight)
    assert violation is not None
    assert (violation.row, violation.column, violation.found) == (1, 8, 3)
    assert str(violation) == "row 1, columns from 8: 3 non-zeros, at most 2 allowed"


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 17),
    percent=st.integers(1, 99),
    scope=st.sampled_from(["row", "matrix"]),
)
def test_unstructured_masks_have_the_exact_count(
    rows: int, columns: int, percent: int, scope: str
) -> None:
    pattern = UnstructuredPattern(percent / 100, scope="row" if scope == "row" else "matrix")
    scores = torch.rand(rows, columns) + 0.1
    mask = pattern.best_mask(scores)
    total = columns if scope == "row" else rows * columns
    kept = total * (100 - percent) // 100
    counts = mask.sum(dim=-1) if scope == "row" else mask.sum().reshape(1)
    assert set(counts.tolist()) == {kept}
    assert pattern.first_violation(scores.where(mask, 0)) is None
    assert pattern.first_violation(scores) is not None


def test_one_weight_too_many_breaks_an_unstructured_pattern() -> None:
    pattern = UnstructuredPattern(0.5)
    weight = pattern.project(torch.rand(4, 6) + 0.1)
    weight[weight == 0] = torch.eye(12)[0]
    assert str(pattern.first_violation(weight)).endswith("13 non-zeros, at most 12 allowed")


def test_rows_that_obey_alone_obey_together() -> None:
    pattern = UnstructuredPattern(0.3)
    weight = torch.rand(5, 7) + 0.1
    assert pattern.first_violation(pattern.per_row.project(weight)) is None


@pytest.mark.parametrize(
    "text",
    ["2:4", "1:4", "4:8", "50%", "62.5%", "70%", "5%", "66.6666667%", "99.99999%", "0.00001%"],
)
def test_a_pattern_reads_back_what_it_writes(text: str) -> None:
    assert str(SparsityPattern.parse(text)) == text


@given(st.floats(1e-80, 1, exclude_max=True))
def test_every_share_of_zeros_is_written_to_the_last_bit(share: float) -> None:
    pattern = UnstructuredPattern(share)
    assert SparsityPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["66.6666667%", "33.33333333333333333%", "12.3456789%"])
def test_a_weight_obeys_the_pattern_that_is_written_beside_it(text: str) -> None:
    pattern = SparsityPattern.parse(text)
    weight = pattern.project(torch.rand(96, 96) + 0.1)
    assert SparsityPattern.parse(str(pattern)).first_violation(weight) is None


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0%", "100%", "half", "2:", "-1:4"])
def test_a_pattern_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        SparsityPattern.parse(text)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0, 2, 0], [0, 1, 0, 3]], ("1:2", 1)),
        ([[1, 2, 0, 4], [0, 0, 3, 0]], ("1:2", 0)),
        ([[1, 2, 0, 0], [0, 0, 1, 3]], ("2:4", 1)),
        ([[1, 2, 0, 0, 0, 0, 3, 4], [5, 0, 0, 6, 7, 8, 0, 0]], ("2:4", 1)),
        ([[1, 2, 3, 0], [0, 1, 2, 3]], ("3:4", 1)),
        ([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3]], ("dense", None)),
        ([[0, 0, 0, 0]], ("zero", None)),
        ([[1, 0, 2], [1, 3, 4], [0, 1, 2]], ("22% unstructured", None)),
    ],
)
def test_the_strictest_pattern_is_found_with_its_axis(
    rows: list[list[float]], expected: tuple[str, int | None]
) -> None:
    assert strictest_pattern(torch.tensor(rows, dtype=torch.float32)) == expected
