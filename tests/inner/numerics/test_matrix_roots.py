"""Inverse roots against eigenvectors, and their derivatives where eigenvectors have none."""

from functools import partial

import pytest
import torch

from hyperdescent.inner.numerics.matrix_roots import newton_inverse_root

F64 = torch.float64


def rotated(values, seed=0):
    """A symmetric matrix of these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    return q * values @ q.mT, q


def of_symmetric(x, p, **given):
    return newton_inverse_root((x + x.mT) / 2, p, **given)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8, 10])
class TestValue:
    @pytest.mark.parametrize("condition", [1e2, 1e6, 1e8])
    def test_is_that_of_the_eigenvalues(self, p, condition):
        values = 7 * torch.logspace(0, -torch.tensor(condition).log10(), 6, dtype=F64)
        a, q = rotated(values)
        exact = q * values ** (-1 / p) @ q.mT
        # What is rounding in the largest eigenvalue is that times the condition in the least.
        bound = 3e-15 * condition * torch.linalg.norm(exact)
        assert torch.linalg.norm(newton_inverse_root(a, p) - exact) < bound

    def test_ridge_is_in_units_of_the_norm(self, p):
        values = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=F64)
        a, q = rotated(values)
        exact = q * (values + 0.1 * 5) ** (-1 / p) @ q.mT
        torch.testing.assert_close(
            newton_inverse_root(a, p, ridge=0.1), exact, rtol=1e-12, atol=1e-12
        )

    def test_of_zeros_is_that_of_the_ridge(self, p):
        found = newton_inverse_root(torch.zeros(3, 3, dtype=F64), p, ridge=0.2)
        exact = 0.2 ** (-1 / p) * torch.eye(3, dtype=F64)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)

    def test_of_a_singular_matrix_is_finite(self, p):
        a, q = rotated(torch.tensor([2.0, 0.0, 0.0], dtype=F64))
        found = q.mT @ newton_inverse_root(a, p) @ q
        assert found.isfinite().all()
        assert (found[0, 0] - 2.0 ** (-1 / p)).abs() < 1e-14 * found.abs().max()

    def test_of_float32_sums_of_low_rank_is_finite(self, p):
        # Their least eigenvalues are rounding, of either sign.
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        a = 1e-6 * torch.eye(50) + 1e3 * x @ x.mT
        assert torch.linalg.eigvalsh(a)[0] < 0
        assert newton_inverse_root(a, p).isfinite().all()

    def test_of_a_batch_is_that_of_each(self, p):
        each = torch.stack(
            [rotated(torch.tensor([1.0, 2.0, k], dtype=F64))[0] for k in (0.1, 3, 9)]
        )
        alone = torch.stack([newton_inverse_root(a, p) for a in each])
        for batched in (
            newton_inverse_root(each, p),
            torch.vmap(partial(newton_inverse_root, p=p))(each),
        ):
            torch.testing.assert_close(batched, alone, rtol=1e-13, atol=1e-13)


# torch's own forward mode scripts its decompositions on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
class TestDerivative:
    @pytest.mark.parametrize("values", [[1.0, 2.0, 5.0], [2.0, 2.0, 5.0], [3.0, 3.0, 3.0]])
    @pytest.mark.parametrize("p", [2, 4])
    def test_first_and_second_are_right_where_eigenvalues_meet(self, values, p):
        a = rotated(torch.tensor(values, dtype=F64))[0].requires_grad_()
        root = partial(of_symmetric, p=p)
        assert torch.autograd.gradcheck(root, a, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(root, a)

    def test_in_the_ridge_is_right(self):
        a, _ = rotated(torch.tensor([1.0, 0.0, 0.0], dtype=F64))
        ridge = torch.tensor(0.1, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: newton_inverse_root(a, 4, ridge=x), ridge)

    def test_of_a_multiple_of_the_identity_is_the_derivative_of_a_number(self):
        a = (2 * torch.eye(3, dtype=F64)).requires_grad_()
        (slope,) = torch.autograd.grad(newton_inverse_root(a, 4).trace(), a)
        exact = -1 / 4 * 2 ** (-5 / 4) * torch.eye(3, dtype=F64)
        torch.testing.assert_close(slope, exact, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.1])
    @pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    def test_first_and_second_are_finite_at_singular_matrices(self, values, ridge):
        a = rotated(torch.tensor(values, dtype=F64))[0].requires_grad_()
        root = of_symmetric(a, 4, ridge=ridge)
        (slope,) = torch.autograd.grad(root.square().sum(), a, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), a)
        assert slope.isfinite().all() and second.isfinite().all()
