"""Solvers against closed forms, optimality conditions and each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import NumericalError
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.fista import fista, kkt_residual, soft_threshold
from sparseserve.solvers.linalg import largest_eigenvalue, upper_inverse_factor
from sparseserve.solvers.problem import OperatorProblem, better_rows, operator_problem
from sparseserve.solvers.statistics import InputStatistics, output_error
from sparseserve.sparsity import TWO_FOUR


def solve(problem: OperatorProblem, start: torch.Tensor, l1: float, **options: Any) -> Any:
    lipschitz = largest_eigenvalue(problem.gram)
    return fista(problem, start, l1=l1, lipschitz=lipschitz, **options)


@given(st.floats(-5, 5), st.floats(0, 3))
def test_soft_threshold_minimises_its_scalar_problem(value: float, threshold: float) -> None:
    found = float(soft_threshold(torch.tensor(value, dtype=torch.float64), threshold))

    def objective(w: float) -> float:
        return 0.5 * (w - value) ** 2 + threshold * abs(w)

    for other in (0.0, value, found + 1e-3, found - 1e-3):
        assert objective(found) <= objective(other) + 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_the_objective_is_half_the_output_error_up_to_a_constant(
    make_case: Any, corrected: bool
) -> None:
    case = make_case(corrected=corrected)
    problem = operator_problem(case.weight, case.statistics, damping=0.0)
    first, second = (case.weight + 0.3 * torch.randn_like(case.weight) for _ in range(2))
    errors = [output_error(w, case.weight, case.statistics) for w in (first, second)]
    difference = problem.loss_rows(first) - problem.loss_rows(second)
    torch.testing.assert_close(
        difference.double(), (errors[0] - errors[1]) / 2, rtol=1e-3, atol=1e-2
    )


def test_damping_pulls_towards_the_dense_weight(make_case: Any) -> None:
    case = make_case(corrected=True)
    problem = operator_problem(case.weight, case.statistics, damping=1e6)
    solution = torch.linalg.solve(problem.gram.double(), problem.target.double().T).T
    torch.testing.assert_close(solution.float(), case.weight, rtol=1e-3, atol=1e-3)


def test_the_gradient_is_that_of_the_objective(make_case: Any) -> None:
    case = make_case(corrected=True)
    problem = operator_problem(case.weight, case.statistics, damping=0.01)
    weight = (case.weight * 0.5).requires_grad_()
    (automatic,) = torch.autograd.grad(problem.loss_rows(weight).sum(), weight)
    by_hand = problem.gradient(weight.detach())
    torch.testing.assert_close(by_hand, automatic, rtol=1e-3, atol=1e-1)


def test_column_scaling_keeps_the_objective(make_case: Any) -> None:
    case = make_case(corrected=True)
    problem = operator_problem(case.weight, case.statistics, damping=0.01)
    scaled, scale = problem.column_scaled()
    weight = case.weight * 0.7
    torch.testing.assert_close(
        scaled.loss_rows(weight * scale), problem.loss_rows(weight), rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(scaled.gram.diagonal(), torch.ones(16))


def test_fista_on_orthogonal_inputs_is_one_soft_threshold() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    gram = torch.eye(8, dtype=torch.float64) * 3
    problem = operator_problem(weight, InputStatistics(gram, gram, gram, 1), damping=0.0)
    result = fista(problem, torch.zeros_like(weight), l1=0.6, lipschitz=3.0, iterations=2)
    torch.testing.assert_close(result.weight, soft_threshold(weight, 0.2))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_fista_ends_where_the_optimality_conditions_hold(
    make_case: Any, restart: bool, corrected: bool
) -> None:
    case = make_case(corrected=corrected)
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    l1 = 0.1 * float(problem.target.abs().max())
    result = solve(
        problem, problem.reference, l1, iterations=5000, kkt_tolerance=1e-3 * l1, restart=restart
    )
    assert result.converged
    residual = kkt_residual(problem.gradient(result.weight), result.weight, l1)
    assert float(residual.max()) < 2e-3 * l1
    assert (result.weight == 0).any()
    assert (result.weight != 0).any()
    from_zero = solve(
        problem, torch.zeros_like(case.weight), l1, iterations=5000, kkt_tolerance=1e-3 * l1
    )
    change = (result.weight - from_zero.weight).norm() / result.weight.norm()
    assert float(change) < 0.01


def test_the_kkt_residual_sees_a_weight_that_is_not_optimal(make_case: Any) -> None:
    case = make_case()
    problem = operator_problem(case.weight, case.statistics, 0.01)
    residual = kkt_residual(problem.gradient(case.weight), case.weight, 5.0)
    torch.testing.assert_close(residual.max(), torch.tensor(5.0), rtol=1e-2, atol=0)


def test_above_the_largest_penalty_everything_is_zero(make_case: Any) -> None:
    case = make_case()
    problem = operator_problem(case.weight, case.statistics, 0.01)
    l1 = 1.01 * float(problem.target.abs().max())
    zero = solve(problem, torch.zeros_like(case.weight), l1, iterations=20).weight
    assert not zero.any()


def test_one_penalty_a_row_solves_each_row_alone(make_case: Any) -> None:
    case = make_case(rows=3)
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    penalties = torch.tensor([[10.0], [100.0], [1000.0]])
    together = fista(problem, problem.reference, l1=penalties, lipschitz=20.0, iterations=30)
    for row, penalty in enumerate(penalties.flatten().tolist()):
        alone = fista(problem, problem.reference, l1=penalty, lipschitz=20.0, iterations=30)
        torch.testing.assert_close(together.weight[row], alone.weight[row])


def test_fista_stops_when_its_step_is_short(make_case: Any) -> None:
    case = make_case()
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    result = solve(problem, problem.reference, 50.0, iterations=5000, step_tolerance=1e-2)
    assert result.converged
    assert result.iterations < 5000


@pytest.mark.parametrize("corrected", [False, True])
def test_a_refit_reaches_the_least_squares_solution_on_its_mask(
    make_case: Any, corrected: bool
) -> None:
    case = make_case(corrected=corrected)
    problem = operator_problem(case.weight, case.statistics, 0.01)
    mask = TWO_FOUR.best_mask(case.weight.abs())
    found = refit(problem, mask, case.weight, iterations=60).weight
    for row in range(len(mask)):
        kept = mask[row]
        gram = problem.gram[kept][:, kept].double()
        expected = torch.linalg.solve(gram, problem.target[row, kept].double())
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-3, atol=1e-3)
        assert not found[row, ~kept].any()


def test_every_refit_step_lowers_the_objective(make_case: Any) -> None:
    case = make_case(corrected=True)
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    weight = TWO_FOUR.project(problem.reference)
    losses = [
        problem.loss_rows(refit(problem, weight != 0, weight, iterations=steps).weight)
        for steps in range(1, 8)
    ]
    for earlier, later in itertools.pairwise(losses):
        assert (later <= earlier + 1e-3 * earlier.abs()).all()
    assert losses[-1].sum() < losses[0].sum()


def test_a_refit_of_a_row_without_weights_stays_zero(make_case: Any) -> None:
    case = make_case()
    problem = operator_problem(case.weight, case.statistics, 0.01)
    mask = TWO_FOUR.best_mask(case.weight.abs())
    mask[0] = False
    found = refit(problem, mask, case.weight, iterations=10).weight
    assert not found[0].any()
    assert torch.isfinite(found).all()


def test_better_rows_takes_the_lower_objective_of_each_row(make_case: Any) -> None:
    case = make_case(rows=2)
    problem = operator_problem(case.weight, case.statistics, 0.01)
    first, second = case.weight * 0.5, case.weight * 0.5
    first[0], second[1] = case.weight[0], case.weight[1]
    torch.testing.assert_close(better_rows(problem, first, second), case.weight)


@given(st.integers(0, 50))
def test_the_eigenvalue_bound_is_above_and_close(seed: int) -> None:
    root = torch.randn(12, 20, generator=torch.Generator().manual_seed(seed))
    gram = root @ root.T
    exact = float(torch.linalg.eigvalsh(gram).max())
    assert exact * 0.999 <= largest_eigenvalue(gram) <= exact * 1.03


def test_the_inverse_factor_reproduces_the_inverse(make_case: Any) -> None:
    gram = operator_problem(make_case().weight, make_case().statistics, 0.01).gram
    factor = upper_inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ gram, torch.eye(16), rtol=0, atol=1e-3)


def test_a_gram_that_is_not_positive_definite_is_named_with_its_eigenvalue() -> None:
    with pytest.raises(NumericalError, match="eigenvalue -1"):
        upper_inverse_factor(torch.diag(torch.tensor([1.0, -1.0])))


def test_inputs_without_energy_are_refused() -> None:
    gram = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(NumericalError, match="mean energy 0"):
        operator_problem(torch.ones(2, 4), InputStatistics(gram, gram, gram, 3), 0.01)


def test_a_weight_that_is_not_finite_is_refused(make_case: Any) -> None:
    case = make_case()
    weight = case.weight.clone()
    weight[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="weight has NaN or infinite"):
        operator_problem(weight, case.statistics, 0.01)


def test_a_refit_says_whether_it_came_to_rest(make_case: Any) -> None:
    case = make_case(corrected=True)
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    mask = TWO_FOUR.best_mask(problem.reference.abs())
    short, whole = (
        refit(problem, mask, problem.reference, iterations=count) for count in (2, 1000)
    )
    assert whole.converged
    assert whole.residual <= 1e-6
    assert whole.iterations < 1000
    assert not short.converged
    assert short.residual > whole.residual
    left = (-problem.gradient(short.weight)).where(mask, 0).square() / problem.gram.diagonal()
    start = problem.target.where(mask, 0).square() / problem.gram.diagonal()
    expected = (left.sum(dim=1) / start.sum(dim=1)).sqrt().max()
    assert short.residual == pytest.approx(float(expected), rel=1e-2)


def test_fista_makes_no_product_that_it_does_not_count(make_case: Any) -> None:
    case = make_case()
    problem, _ = operator_problem(case.weight, case.statistics, 0.01).column_scaled()
    made = 0

    class Counted(OperatorProblem):
        def gradient(self, weight: torch.Tensor) -> torch.Tensor:
            nonlocal made
            made += 1
            return super().gradient(weight)

    parts = (problem.reference, problem.gram, problem.target, problem.pull)
    result = solve(Counted(*parts), problem.reference, 5.0, iterations=7)
    assert made == result.iterations == 7
