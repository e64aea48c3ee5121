"""Rotations of heads are orthogonal and lower what a pattern removes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseserve.solvers.head_rotation import HeadWeights, learn_rotations
from sparseserve.sparsity import TWO_FOUR, SparsityPattern, UnstructuredPattern

HEADS, SHARED_BY, WIDTH, HIDDEN = 2, 2, 8, 24


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(width: int, seed: int) -> Tensor:
    inputs = normal(4 * width, width, seed=seed) * torch.logspace(-0.5, 0.5, width)
    return inputs.T @ inputs


def weights() -> HeadWeights:
    inputs = HEADS * SHARED_BY * WIDTH
    return HeadWeights(
        normal(HEADS, WIDTH, HIDDEN, seed=1),
        normal(HIDDEN, HEADS, SHARED_BY, WIDTH, seed=2),
        gram(HIDDEN, seed=3),
        gram(inputs, seed=4),
    )


def removed(weight: Tensor, second_moment: Tensor, pattern: SparsityPattern) -> float:
    """The loss written plainly: the scores of what is removed, over the energy of all."""
    scaled = (second_moment / second_moment.diagonal().mean()).double()
    inverse = torch.linalg.inv(scaled + 0.01 * torch.eye(len(scaled)))
    scores = weight.double().square() / inverse.diagonal()
    energy = torch.trace(weight.double() @ scaled @ weight.double().T)
    return float(scores[~pattern.best_mask(scores)].sum() / energy)


def turned(case: HeadWeights, rotations: Tensor) -> HeadWeights:
    """The same layer in the new basis, its second moment as it would be measured there."""
    blocks = [rotation for rotation in rotations.float() for _ in range(SHARED_BY)]
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return HeadWeights(
        rotations.float().mT @ case.values,
        (case.outputs.flatten(1) @ whole).reshape(case.outputs.shape),
        case.value_gram,
        whole.T @ case.output_gram @ whole,
    )


def loss(case: HeadWeights, pattern: SparsityPattern) -> float:
    return removed(case.values.flatten(0, 1), case.value_gram, pattern) + removed(
        case.outputs.flatten(1), case.output_gram, pattern
    )


@pytest.mark.parametrize("pattern", [TWO_FOUR, UnstructuredPattern(0.5, scope="row")], ids=str)
def test_the_losses_it_reports_are_those_of_the_turned_weights(pattern: SparsityPattern) -> None:
    case = weights()
    learned = learn_rotations(case, pattern, steps=60)
    unit = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(learned.rotations.mT @ learned.rotations, unit.expand(HEADS, -1, -1))
    assert learned.before == pytest.approx(loss(case, pattern), rel=1e-4)
    assert learned.after == pytest.approx(loss(turned(case, learned.rotations), pattern), rel=1e-3)
    assert learned.after < 0.9 * learned.before


def test_the_basis_in_which_a_layer_is_sparse_is_found_again() -> None:
    dense = weights()
    sparse = HeadWeights(
        TWO_FOUR.project(dense.values.flatten(0, 1)).reshape(dense.values.shape),
        TWO_FOUR.project(dense.outputs.flatten(1)).reshape(dense.outputs.shape),
        torch.eye(HIDDEN),
        torch.eye(HEADS * SHARED_BY * WIDTH),
    )
    slants = 0.1 * normal(HEADS, WIDTH, WIDTH, seed=6)
    mixed = turned(sparse, torch.linalg.matrix_exp(slants - slants.mT))
    assert loss(sparse, TWO_FOUR) == 0
    learned = learn_rotations(mixed, TWO_FOUR)
    assert learned.after < 0.05 * learned.before


def test_no_steps_rotate_nothing() -> None:
    learned = learn_rotations(weights(), TWO_FOUR, steps=0)
    assert learned.before == learned.after
    absolute = learned.rotations.abs()
    torch.testing.assert_close(
        absolute, torch.eye(WIDTH, dtype=torch.float64).expand(HEADS, -1, -1)
    )
