"""ADMM against plain versions in float64, closed forms, brute force and its authors' figures."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparseserve.errors import NumericalError, RecipeError
from sparseserve.pruners import PRUNERS
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.admm_gradual import GradualAdmm
from sparseserve.pruners.fista import Fista
from sparseserve.pruners.refit import Refit
from sparseserve.solvers.admm import AdmmResult, admm, admm_gradual
from sparseserve.solvers.linalg import shifted_inverse
from sparseserve.solvers.problem import OperatorProblem, operator_problem
from sparseserve.solvers.statistics import InputStatistics, output_error, relative_output_error
from sparseserve.sparsity import TWO_FOUR, NMPattern, SparsityPattern, UnstructuredPattern

OPERATOR = Path(__file__).parents[2] / "data" / "operator.safetensors"
BY_ROW = UnstructuredPattern(0.5, scope="row")


@pytest.fixture(params=[False, True], ids=["uncorrected", "corrected"])
def case(request: pytest.FixtureRequest, make_case: Any) -> Any:
    return make_case(corrected=request.param, rows=10, columns=24)


def double(problem: OperatorProblem) -> OperatorProblem:
    """In float64 a plain version takes the same decisions, however it orders its sums."""
    return OperatorProblem(
        problem.reference.double(),
        problem.gram.double(),
        problem.target.double(),
        problem.pull.double(),
    )


def scaled_problem(case: Any) -> OperatorProblem:
    return double(operator_problem(case.weight, case.statistics, 0.01).column_scaled()[0])


def solve(problem: OperatorProblem, pattern: SparsityPattern, **options: Any) -> AdmmResult:
    knobs: dict[str, Any] = {
        "first_penalty": 0.1,
        "growth": 1.3,
        "interval": 3,
        "settled": 0.0,
        "iterations": 200,
    }
    return admm(problem, pattern, **{**knobs, **options})


def keep_largest_two(weight: Tensor) -> Tensor:
    kept = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for group in range(0, weight.shape[1], 4):
            order = sorted(range(group, group + 4), key=lambda j: -abs(float(weight[row, j])))
            kept[row, order[:2]] = weight[row, order[:2]]
    return kept


def plain_admm(problem: OperatorProblem, steps: int, growth: float, interval: int) -> Tensor:
    """The augmented Lagrangian's own steps, with the multiplier V = rho U and a solve each time."""
    gram, target, rho = problem.gram, problem.target, 0.1
    kept = keep_largest_two(problem.reference)
    multiplier = rho * (problem.reference - kept)
    for step in range(1, steps + 1):
        damped = gram + rho * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(damped, (target - multiplier + rho * kept).T).T
        kept = keep_largest_two(weight + multiplier / rho)
        multiplier = multiplier + rho * (weight - kept)
        if step % interval == 0:
            rho *= growth
    return kept


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_admm_agrees_with_a_plain_version(case: Any, steps: int) -> None:
    problem = scaled_problem(case)
    ours = solve(problem, TWO_FOUR, settled=-1.0, iterations=steps)
    assert ours.iterations == steps
    torch.testing.assert_close(ours.weight, plain_admm(problem, steps, 1.3, 3))


def plain_gradual(problem: OperatorProblem, ramp: int, steps: int) -> Tensor:
    """Boza 2024, rho = 1: prune the lowest of what 2:4 would drop, a little more at each step."""
    inverse = torch.linalg.inv(problem.gram + torch.eye(len(problem.gram)))
    weight, multiplier = problem.reference, torch.zeros_like(problem.reference)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, steps + 1):
        sought = weight + multiplier
        if step <= ramp:
            bad = [tuple(place) for place in (keep_largest_two(sought) == 0).nonzero().tolist()]
            bad.sort(key=lambda place: abs(float(sought[place])))
            mask = torch.ones_like(mask)
            for place in bad[: int(len(bad) * (1 - (1 - step / ramp) ** 3))]:
                mask[place] = False
        kept = sought * mask
        multiplier = multiplier + weight - kept
        weight = (problem.target + kept - multiplier) @ inverse
    return kept


@pytest.mark.parametrize("steps", [15, 20])
def test_gradual_admm_agrees_with_a_plain_version(case: Any, steps: int) -> None:
    problem = scaled_problem(case).pulled(0.1)
    ours = admm_gradual(problem, TWO_FOUR, penalty=1.0, ramp=15, iterations=steps)
    torch.testing.assert_close(ours.weight, plain_gradual(problem, 15, steps))


def test_before_its_ramp_ends_gradual_admm_has_fewer_zeros(case: Any) -> None:
    """Seven fifteenths of the way, 1 - (8/15)^3 of the zeros are in place."""
    result = admm_gradual(scaled_problem(case), TWO_FOUR, penalty=1.0, ramp=15, iterations=7)
    zeros = int((result.weight == 0).sum())
    assert zeros == int((1 - (8 / 15) ** 3) * case.weight.numel() / 2)


@pytest.mark.parametrize("pattern", [TWO_FOUR, NMPattern(1, 4), BY_ROW], ids=str)
def test_the_primal_residual_goes_to_zero(case: Any, pattern: SparsityPattern) -> None:
    problem = scaled_problem(case)
    residuals = [
        solve(problem, pattern, settled=-1.0, iterations=steps).primal_residual
        for steps in (3, 60, 120, 240)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.01
    assert residuals[-1] < 1e-6


@pytest.mark.parametrize("pattern", [TWO_FOUR, UnstructuredPattern(0.5)], ids=str)
def test_admm_stops_when_its_support_is_at_rest(case: Any, pattern: SparsityPattern) -> None:
    problem = scaled_problem(case)
    result = solve(problem, pattern)
    earlier = solve(problem, pattern, settled=-1.0, iterations=result.iterations - 3)
    assert result.settled
    assert result.iterations < 200
    assert not earlier.settled
    assert torch.equal(result.weight != 0, earlier.weight != 0)


def test_a_pull_adds_its_distance_to_the_dense_weight(case: Any) -> None:
    problem = scaled_problem(case)
    weight = 0.5 * problem.reference
    distance = (weight - problem.reference).square().sum(dim=-1)
    torch.testing.assert_close(
        problem.pulled(0.3).loss_rows(weight), problem.loss_rows(weight) + 0.15 * distance
    )


def test_a_few_rows_are_solved_for_as_they_are_among_many(make_case: Any) -> None:
    """Many use the inverse, few the factor; in 2:4 no row depends on another."""
    case = make_case(rows=24, columns=32, corrected=True)
    problem = scaled_problem(case)
    whole = solve(problem, TWO_FOUR, settled=-1.0, iterations=30)
    for first in range(0, 24, 4):
        rows = slice(first, first + 4)
        part = replace(problem, reference=problem.reference[rows], target=problem.target[rows])
        found = solve(part, TWO_FOUR, settled=-1.0, iterations=30)
        assert found.gram_products == 30 + math.ceil(11 * 32 / 4 / 3)
        torch.testing.assert_close(found.weight, whole.weight[rows], rtol=1e-9, atol=1e-9)


def test_the_shifted_inverse_inverts(make_case: Any) -> None:
    gram = (
        operator_problem(make_case().weight, make_case().statistics, 0.01).column_scaled()[0].gram
    )
    before = gram.clone()
    expected = torch.linalg.inv(gram.double() + 0.1 * torch.eye(16))
    torch.testing.assert_close(shifted_inverse(gram, 0.1).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(gram, before)


def test_a_shift_that_is_too_small_is_named_with_the_eigenvalue() -> None:
    with pytest.raises(NumericalError, match=r"eigenvalue -0\.5"):
        shifted_inverse(torch.diag(torch.tensor([1.0, -1.0])), 0.5)


def test_on_uncorrelated_inputs_the_best_mask_is_found() -> None:
    """With a diagonal Gram matrix the error is the sum of w^2 G_jj over what is dropped."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    gram = torch.diag(torch.linspace(0.1, 5, 32)).double()
    statistics = InputStatistics(gram, gram, gram, 1)
    result = Admm().prune(weight, statistics, TWO_FOUR).weight
    energy = weight.square() * gram.diagonal().float()
    least = energy.reshape(-1, 4).topk(2, largest=False).values.sum()
    assert float(output_error(result, weight, statistics).sum()) == pytest.approx(
        float(least), rel=1e-4
    )


def brute_force(problem: OperatorProblem) -> Tensor:
    """The least objective of every row over all masks, by an exact solve on each."""
    pairs = list(combinations(range(4), 2))
    losses = []
    for choice in product(pairs, repeat=problem.gram.shape[0] // 4):
        kept = [4 * group + j for group, pair in enumerate(choice) for j in pair]
        weight = torch.zeros_like(problem.reference)
        block = problem.gram[kept][:, kept]
        weight[:, kept] = torch.linalg.solve(block, problem.target[:, kept].T).T
        losses.append(problem.loss_rows(weight))
    return torch.stack(losses).min(dim=0).values


@pytest.mark.parametrize("corrected", [False, True])
def test_no_mask_is_better_than_brute_force_and_admm_is_close(
    make_case: Any, corrected: bool
) -> None:
    case = make_case(rows=60, columns=8, corrected=corrected)
    problem = double(operator_problem(case.weight, case.statistics, 0.01))
    least = brute_force(problem)
    # The constant that makes the objective a squared error, zero at the unconstrained minimiser.
    free = torch.linalg.solve(problem.gram, problem.target.T).T
    offset = problem.loss_rows(free)
    ours, wanda = (
        problem.loss_rows(method.prune(case.weight, case.statistics, TWO_FOUR).weight.double())
        for method in (Admm(), Refit(base="wanda"))
    )
    assert (ours - least >= -1e-5 * (least - offset)).all()
    excess, greedy = (
        (found - offset).sum() / (least - offset).sum() - 1 for found in (ours, wanda)
    )
    assert float(excess) < 0.06
    assert float(excess) < float(greedy) / 3


@pytest.mark.parametrize("warm_start", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("pattern", [TWO_FOUR, BY_ROW], ids=str)
def test_admm_is_never_worse_than_its_warm_start_in_any_row(
    case: Any, warm_start: str, pattern: SparsityPattern
) -> None:
    warm = PRUNERS[warm_start]().prune(case.weight, case.statistics, pattern).weight
    refitted = Refit(base=warm_start, iterations=4)
    refitted_warm = refitted.prune(case.weight, case.statistics, pattern).weight
    ours = Admm(warm_start=warm_start).prune(case.weight, case.statistics, pattern).weight
    problem = operator_problem(case.weight, case.statistics, 0.01)
    for before in (problem.loss_rows(warm), problem.loss_rows(refitted_warm)):
        assert (problem.loss_rows(ours) <= before + 1e-4 * before.abs()).all()
    assert problem.loss_rows(ours).sum() < problem.loss_rows(refitted_warm).sum()


@pytest.mark.parametrize("pattern", [TWO_FOUR, UnstructuredPattern(0.5)], ids=str)
def test_the_warm_start_is_kept_where_admm_is_worse(case: Any, pattern: SparsityPattern) -> None:
    """Held at a huge penalty, ADMM never leaves its first mask, so SparseGPT's wins somewhere."""
    stuck = Admm(warm_start="sparsegpt", first_penalty=1e6, iterations=1)
    ours = stuck.prune(case.weight, case.statistics, pattern).weight
    warm = Refit(base="sparsegpt", iterations=4).prune(case.weight, case.statistics, pattern).weight
    kept_rows = ((ours != 0) == (warm != 0)).all(dim=1)
    problem = operator_problem(case.weight, case.statistics, 0.01)
    before, after = problem.loss_rows(warm), problem.loss_rows(ours)
    assert kept_rows.any()
    if pattern.rows_are_independent:
        assert (after <= before + 1e-4 * before.abs()).all()
    assert after.sum() <= before.sum()


@pytest.mark.parametrize("pattern", [TWO_FOUR, UnstructuredPattern(0.5)], ids=str)
def test_fista_from_admm_is_never_worse_than_admm(case: Any, pattern: SparsityPattern) -> None:
    problem = operator_problem(case.weight, case.statistics, 0.01)
    before, after = (
        problem.loss_rows(method.prune(case.weight, case.statistics, pattern).weight)
        for method in (Admm(), Fista(warm_start="admm"))
    )
    if pattern.rows_are_independent:
        assert (after <= before + 1e-4 * before.abs()).all()
    assert after.sum() <= before.sum() + 1e-4 * before.sum().abs()


class TestOnARealOperator:
    """The figures are those of the authors' own implementations on the same operator."""

    @staticmethod
    def relative_error(pruner: Any, pattern: SparsityPattern) -> float:
        operator = load_file(OPERATOR)
        gram = operator["gram"].double()
        statistics = InputStatistics(gram, gram, gram, 64 * 512)
        weight = pruner.prune(operator["weight"], statistics, pattern).weight
        return relative_output_error(weight, operator["weight"], statistics)

    @pytest.mark.parametrize(
        ("pattern", "published"), [(TWO_FOUR, 0.1258), (UnstructuredPattern(0.5), 0.0732)], ids=str
    )
    def test_admm_lands_on_the_error_of_alps(
        self, pattern: SparsityPattern, published: float
    ) -> None:
        assert self.relative_error(Admm(), pattern) == pytest.approx(published, rel=0.005)

    def test_gradual_admm_lands_on_its_authors_error(self) -> None:
        assert self.relative_error(GradualAdmm(), TWO_FOUR) == pytest.approx(0.1398, rel=0.002)

    def test_a_slower_penalty_is_better(self) -> None:
        assert self.relative_error(Admm(growth=1.15), TWO_FOUR) < 0.1253


@pytest.mark.parametrize(
    "build",
    [
        lambda: Admm(warm_start="admm"),
        lambda: Admm(growth=1.0),
        lambda: Admm(interval=0),
        lambda: Admm(first_penalty=0.0),
        lambda: Admm(settled=-0.1),
        lambda: GradualAdmm(ramp=21),
        lambda: GradualAdmm(penalty=0.0),
    ],
)
def test_knobs_out_of_range_are_refused(build: Any) -> None:
    with pytest.raises(RecipeError):
        build()
