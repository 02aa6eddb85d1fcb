"""Linear solvers against dense algebra, and the iteration counts theory gives them."""

import math

import pytest
import torch

from hyperdescent.meta.implicit.linear_solvers import (
    conjugate_gradient,
    dense,
    largest_eigenvalue,
    neumann,
    normal_conjugate_gradient,
    nystrom,
)

DOUBLE = torch.float64


def system(condition, size=200, seed=0):
    """A symmetric positive definite A with log-spaced eigenvalues in [1 / condition, 1], and b."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator))[0]
    spectrum = torch.logspace(-math.log10(condition), 0, size, dtype=DOUBLE)
    return basis @ torch.diag(spectrum) @ basis.T, torch.randn(
        size, dtype=DOUBLE, generator=generator
    )


def solve(solver, a, b):
    return solver(lambda x: a @ x, b)


def error(solved, a, b):
    exact = torch.linalg.solve(a, b)
    return float((solved.x - exact).norm() / exact.norm())


def true_residual(solved, a, b):
    return float((b - a @ solved.x).norm() / b.norm())


class TestConjugateGradient:
    def test_exact_after_as_many_steps_as_unknowns(self):
        # At condition 10: rounding costs the exactness at 100 (4e-10).
        a, b = system(10, size=12)
        solved = solve(conjugate_gradient(steps=12, tolerance=0.0), a, b)
        assert solved.steps == 12
        assert error(solved, a, b) < 1e-14
        assert error(solve(conjugate_gradient(steps=11, tolerance=0.0), a, b), a, b) > 1e-5

    # Measured in specs/hypergradients.md 2.3, for another basis: hence one step of slack in ten.
    @pytest.mark.parametrize(
        ("condition", "to_1e2", "to_1e6"), [(10, 8, 22), (100, 24, 64), (1000, 68, 173)]
    )
    def test_needs_as_many_steps_as_known(self, condition, to_1e2, to_1e6):
        a, b = system(condition)
        for accuracy, steps in ((1e-2, to_1e2), (1e-6, to_1e6)):
            slack = 1 + steps // 10
            after, before = (
                solve(conjugate_gradient(steps=n, tolerance=0.0), a, b)
                for n in (steps + slack, steps - slack)
            )
            assert error(after, a, b) < accuracy < error(before, a, b)

    @pytest.mark.parametrize("steps", [0, 1, 7, 50])
    def test_the_residual_is_that_of_the_answer(self, steps):
        a, b = system(100)
        solved = solve(conjugate_gradient(steps=steps, tolerance=0.0), a, b)
        assert solved.residual == pytest.approx(true_residual(solved, a, b), rel=1e-6)
        assert solved.steps == steps

    @pytest.mark.parametrize("damping", [0.0, 0.5])
    def test_unchecked_it_takes_no_product_for_the_residual(self, damping):
        a, b = system(100)
        products = []
        solver = conjugate_gradient(7, tolerance=1e-16, damping=damping, check=False)
        solved = solver(lambda x: products.append(0) or a @ x, b)
        assert len(products) == solved.steps == 7
        assert solved.residual == pytest.approx(true_residual(solved, a, b), rel=1e-9)
        torch.testing.assert_close(solved.x, solve(conjugate_gradient(7, 1e-16, damping), a, b).x)
        assert solver(lambda x: a @ x, 0 * b).residual == 0

    def test_stops_at_the_tolerance_with_the_iterate_that_met_it(self):
        a, b = system(100)
        solved = solve(conjugate_gradient(steps=200, tolerance=1e-3), a, b)
        one_less = solve(conjugate_gradient(steps=solved.steps - 1, tolerance=0.0), a, b)
        assert true_residual(solved, a, b) <= 1e-3 < true_residual(one_less, a, b)

    def test_damping_solves_the_damped_system_and_shows_its_cost(self):
        a, b = system(100, size=20)
        solved = solve(conjugate_gradient(steps=40, tolerance=1e-14, damping=0.1), a, b)
        assert error(solved, a + 0.1 * torch.eye(20, dtype=DOUBLE), b) < 1e-12
        assert solved.residual == pytest.approx(true_residual(solved, a, b))
        assert solved.residual > 0.1

    def test_an_indefinite_matrix_is_reported(self):
        a, b = system(10, size=20)
        solved = solve(conjugate_gradient(), a - 0.3 * torch.eye(20, dtype=DOUBLE), b)
        assert solved.residual == math.inf
        assert solve(conjugate_gradient(), -a, b).residual == math.inf

    def test_not_a_number_is_reported(self):
        a, b = system(10, size=20)
        assert solve(conjugate_gradient(), a * math.nan, b).residual == math.inf
        assert solve(conjugate_gradient(steps=0), a * math.nan, b).residual == math.inf

    def test_a_zero_right_hand_side_is_solved_by_zero(self):
        a, _ = system(10, size=20)
        solved = solve(conjugate_gradient(), a, torch.zeros(20, dtype=DOUBLE))
        assert solved.residual == 0 and solved.steps == 0 and not solved.x.any()

    def test_keeps_the_dtype_and_the_right_hand_side(self):
        a, b = (x.float() for x in system(10, size=20))
        kept = b.clone()
        assert solve(conjugate_gradient(), a, b).x.dtype == torch.float32
        assert torch.equal(b, kept)

    def test_rejects_what_cannot_be_meant(self):
        with pytest.raises(ValueError, match="steps=-1 is negative"):
            conjugate_gradient(steps=-1)
        with pytest.raises(ValueError, match="damping=-1 must not be negative"):
            conjugate_gradient(damping=-1)


class TestNeumann:
    @pytest.mark.parametrize("steps", [0, 1, 5, 50])
    def test_is_the_series(self, steps):
        a, b = system(10, size=20)
        power = torch.eye(20, dtype=DOUBLE)
        total = torch.zeros(20, dtype=DOUBLE)
        for _ in range(steps + 1):
            total += 0.9 * power @ b
            power = power @ (torch.eye(20, dtype=DOUBLE) - 0.9 * a)
        solved = solve(neumann(0.9, steps=steps), a, b)
        torch.testing.assert_close(solved.x, total, rtol=1e-12, atol=1e-14)
        assert solved.residual == pytest.approx(true_residual(solved, a, b))
        assert solved.steps == steps

    @pytest.mark.parametrize("steps", [0, 10, 100])
    def test_the_slowest_error_decays_as_theory_says(self, steps):
        a, _ = system(10, size=20)
        spectrum, directions = torch.linalg.eigh(a)
        solved = solve(neumann(0.9, steps=steps), a, directions[:, 0])
        left = (1 - 0.9 * float(spectrum[0])) ** (steps + 1)
        assert error(solved, a, directions[:, 0]) == pytest.approx(left, rel=1e-9)

    @pytest.mark.parametrize(("condition", "to_1e2", "to_1e6"), [(10, 37, 120), (100, 392, 1262)])
    def test_needs_as_many_steps_as_known(self, condition, to_1e2, to_1e6):
        a, b = system(condition, seed=1)
        for accuracy, steps in ((1e-2, to_1e2), (1e-6, to_1e6)):
            slack = 1 + steps // 10
            after, before = (
                solve(neumann(1.0, steps=n), a, b) for n in (steps + slack, steps - slack)
            )
            assert error(after, a, b) < accuracy < error(before, a, b)

    def test_divergence_is_reported(self):
        a, b = system(10, size=20)
        assert solve(neumann(2.5), a, b).residual == math.inf
        assert solve(neumann(0.5), a - 0.3 * torch.eye(20, dtype=DOUBLE), b).residual > 0.5
        assert solve(neumann(0.5, steps=60), a - 0.3 * torch.eye(20, dtype=DOUBLE), b).residual > 1
        assert solve(neumann(0.5), a * math.nan, b).residual == math.inf

    @pytest.mark.parametrize("steps", [0, 1, 7])
    def test_unchecked_its_residual_is_that_of_one_term_less(self, steps):
        a, b = system(10, size=20)
        products = []
        solved = neumann(0.9, steps, check=False)(lambda x: products.append(0) or a @ x, b)
        assert len(products) == solved.steps == steps
        torch.testing.assert_close(solved.x, solve(neumann(0.9, steps), a, b).x)
        less = solved.x - 0.9 * torch.linalg.matrix_power(torch.eye(20) - 0.9 * a, steps) @ b
        assert solved.residual == pytest.approx(float((b - a @ less).norm() / b.norm()))

    def test_a_step_size_below_the_limit_converges(self):
        a, b = system(10, size=20)
        assert solve(neumann(1.99, steps=3000), a, b).residual < 1e-10

    def test_rejects_what_cannot_be_meant(self):
        with pytest.raises(ValueError, match="step_size=0 must be positive"):
            neumann(0.0)
        with pytest.raises(ValueError, match="steps=-2 is negative"):
            neumann(0.1, steps=-2)

    def test_without_a_step_size_it_finds_one(self):
        a, b = system(10, size=20)
        solved = solve(neumann(steps=200), a, b)
        assert solved.residual < 1e-6 and solved.steps == 210
        top = largest_eigenvalue(lambda x: a @ x, b, 10)
        assert 0.8 < top <= 1 + 1e-12
        torch.testing.assert_close(solved.x, solve(neumann(1 / (1.1 * top), steps=200), a, b).x)


class TestNormalConjugateGradient:
    def test_exact_after_as_many_steps_as_unknowns(self):
        # At condition 3, whose square counts here: as for conjugate gradients, rounding.
        a, b = system(3, size=12)
        solved = solve(normal_conjugate_gradient(steps=12, tolerance=0.0), a, b)
        assert solved.steps == 25
        assert error(solved, a, b) < 1e-13
        assert error(solve(normal_conjugate_gradient(steps=11, tolerance=0.0), a, b), a, b) > 1e-6

    def test_needs_no_positive_curvature(self):
        a, b = system(10, size=20)
        shifted = a - 0.3 * torch.eye(20, dtype=DOUBLE)
        assert torch.linalg.eigvalsh(shifted)[0] < 0
        solved = solve(normal_conjugate_gradient(steps=60, tolerance=1e-14), shifted, b)
        assert error(solved, shifted, b) < 1e-8 and solved.residual < 1e-8

    def test_a_matrix_that_is_not_symmetric(self):
        a, b = system(10, size=20)
        skew = a + torch.triu(torch.full((20, 20), 0.05, dtype=DOUBLE))
        solver = normal_conjugate_gradient(steps=60, tolerance=1e-14)
        solved = solver(lambda x: skew @ x, b, transposed=lambda x: skew.T @ x)
        assert error(solved, skew, b) < 1e-9
        assert error(solver(lambda x: skew @ x, b), skew, b) > 1e-2

    @pytest.mark.parametrize("steps", [0, 1, 7])
    def test_the_residual_is_that_of_the_answer(self, steps):
        a, b = system(100)
        solved = solve(normal_conjugate_gradient(steps=steps, tolerance=0.0), a, b)
        assert solved.residual == pytest.approx(true_residual(solved, a, b), rel=1e-9)

    def test_what_has_no_answer_is_reported(self):
        a, b = system(10, size=20)
        assert solve(normal_conjugate_gradient(), a * math.nan, b).residual == math.inf
        assert solve(normal_conjugate_gradient(), 0 * a, b).residual == 1
        assert solve(normal_conjugate_gradient(), a, 0 * b).residual == 0

    def test_rejects_what_cannot_be_meant(self):
        with pytest.raises(ValueError, match="steps=-1 is negative"):
            normal_conjugate_gradient(steps=-1)
        with pytest.raises(ValueError, match="tolerance=-1 must not be negative"):
            normal_conjugate_gradient(tolerance=-1)


def low_rank(size=200, large=10, small=1e-4, seed=0):
    """Ten large eigenvalues and many tiny ones, and b."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator))[0]
    spectrum = torch.full((size,), small, dtype=DOUBLE)
    spectrum[:large] = torch.linspace(1, 10, large, dtype=DOUBLE)
    b = torch.randn(size, dtype=DOUBLE, generator=generator)
    return basis @ torch.diag(spectrum) @ basis.T, b


class TestNystrom:
    def test_all_columns_give_the_damped_inverse(self):
        a, b = system(100, size=30)
        solved = solve(nystrom(rank=30, damping=0.05), a, b)
        assert error(solved, a + 0.05 * torch.eye(30, dtype=DOUBLE), b) < 1e-8
        assert solved.steps == 30
        assert solved.residual == pytest.approx(true_residual(solved, a, b))

    def test_more_columns_than_there_are_only_takes_all(self):
        a, b = system(10, size=8)
        assert solve(nystrom(rank=50), a, b).steps == 8

    @pytest.mark.parametrize(("rank", "cosine"), [(10, 0.9999), (20, 0.9999), (50, 0.9999)])
    def test_as_many_columns_as_large_eigenvalues_are_enough_and_more_do_no_harm(
        self, rank, cosine
    ):
        # The textbook form loses digits there: cosine .994 for 20 columns, .977 for 50.
        a, b = low_rank()
        x = solve(nystrom(rank=rank, damping=0.01), a, b).x
        exact = torch.linalg.solve(a + 0.01 * torch.eye(len(b), dtype=DOUBLE), b)
        assert float(x @ exact / (x.norm() * exact.norm())) > cosine

    def test_single_precision(self):
        a, b = (x.float() for x in low_rank(small=0.0))
        x = solve(nystrom(rank=50, damping=0.1), a, b).x
        assert x.dtype == torch.float32
        exact = torch.linalg.solve(a + 0.1 * torch.eye(len(b)), b)
        assert float((x - exact).norm() / exact.norm()) < 1e-3

    def test_columns_are_a_function_of_the_seed(self):
        a, b = system(10, size=20)
        one, again, other = (solve(nystrom(5, seed=s), a, b).x for s in (0, 0, 1))
        assert torch.equal(one, again) and not torch.equal(one, other)

    def test_an_indefinite_matrix_is_reported(self):
        a, b = system(10, size=20)
        shifted = a - 0.5 * torch.eye(20, dtype=DOUBLE)
        assert solve(nystrom(rank=20), shifted, b).residual == math.inf
        assert solve(nystrom(), a * math.nan, b).residual == math.inf

    def test_rejects_what_cannot_be_meant(self):
        with pytest.raises(ValueError, match="rank=0 asks for no column"):
            nystrom(rank=0)
        with pytest.raises(ValueError, match="damping=0 must be positive"):
            nystrom(damping=0.0)


class TestDense:
    def test_is_the_inverse(self):
        a, b = system(1000, size=50)
        solved = solve(dense(), a, b)
        assert error(solved, a, b) < 1e-12 and solved.steps == 50
        assert solved.residual == pytest.approx(true_residual(solved, a, b), abs=1e-14)

    def test_an_indefinite_matrix_is_reported(self):
        a, b = system(10, size=20)
        assert solve(dense(), a - 0.3 * torch.eye(20, dtype=DOUBLE), b).residual == math.inf
        assert solve(dense(), a * math.nan, b).residual == math.inf

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match=r"5,000 by 5,000, and stops at 4,096.*conjugate"):
            dense()(lambda x: x, torch.ones(5000))
