"""Updates of a pruned weight: their gradients and steps are those of what they stand for."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from sparseserve.retraining.updates import KeptWeights, MaskedLowRank, Update, installed
from sparseserve.sparsity import TWO_FOUR


def test_gradient_of_the_masked_product_is_that_of_a_dense_reparametrisation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = TWO_FOUR.project(torch.randn(6, 8, generator=generator))
    inputs = torch.randn(10, 8, generator=generator)
    layer = nn.Linear(8, 6, bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    change = MaskedLowRank(layer.weight, rank=3, scale=2.0, generator=generator)
    with torch.no_grad():
        change.left.normal_(generator=generator)
    with installed([Update(layer, "weight", change)]):
        torch.autograd.backward([layer(inputs).square().sum()])

    # The gradient with respect to a whole dense weight, taken through the mask by hand.
    product = 2.0 * change.left.detach() @ change.right.detach()
    dense = torch.where(weight != 0, weight + product, 0).requires_grad_()
    torch.autograd.backward([functional.linear(inputs, dense).square().sum()])
    assert dense.grad is not None
    masked = 2.0 * dense.grad * (weight != 0)
    torch.testing.assert_close(change.left.grad, masked @ change.right.detach().T)
    torch.testing.assert_close(change.right.grad, change.left.detach().T @ masked)
    assert torch.equal(layer.weight, weight)


def test_a_first_step_moves_every_kept_weight_by_the_rate_times_their_size() -> None:
    weight = TWO_FOUR.project(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    layer = nn.Linear(8, 6, bias=False).requires_grad_(False)
    layer.weight.copy_(7 * weight)
    change = KeptWeights(layer.weight)
    size = float(layer.weight[weight != 0].square().mean().sqrt())
    # Adam's first step is the sign of the gradient.
    optimizer = torch.optim.Adam(change.parameters(), lr=1e-3)
    with installed([Update(layer, "weight", change)]):
        torch.autograd.backward([layer(torch.rand(10, 8)).square().sum()])
        optimizer.step()
    moved = (change(layer.weight) - layer.weight).abs()
    torch.testing.assert_close(moved, 1e-3 * size * (weight != 0), rtol=1e-2, atol=1e-7)
