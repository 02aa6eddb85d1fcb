"""Polar factors and inverse roots against those of decompositions, and their slopes."""

import pytest
import torch

from hyperdescent.inner.numerics.newton_schulz import (
    JORDAN,
    POLAR_EXPRESS,
    QUINTIC,
    first,
    inverse_root,
    polar,
)

F64 = torch.float64


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def singular(x):
    return torch.linalg.svdvals(x.double())


def with_singular(values, columns):
    """A matrix, with as many rows as values."""
    rows = len(values)
    u = torch.linalg.qr(noise(1, rows, rows))[0]
    return u * values @ torch.linalg.qr(noise(2, columns, rows))[0].mT


def on_numbers(rows, s):
    for a, b, c in rows:
        s = a * s + b * s**3 + c * s**5
    return s


class TestPolar:
    @pytest.mark.parametrize(
        ("rows", "low", "high"), [(JORDAN, 0.682, 1.134), (QUINTIC, 0.978, 1.032)]
    )
    @pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
    def test_five_steps_bring_singular_values_into_the_known_band(self, rows, low, high, dtype):
        # One batch of 2 x 2 matrices of norm 1, so that the start leaves them as they are.
        s = torch.linspace(0.01, 1 - 5e-5, 5000, dtype=F64)
        x = torch.diag_embed(torch.stack([s, (1 - s * s).sqrt()], -1)).to(dtype)
        made = polar(x, first(rows, 5))
        assert made.dtype == dtype
        among = made.diagonal(dim1=-2, dim2=-1)
        # The first of a pair only: the other may be below 0.01.
        assert among[:, 0].min().item() == pytest.approx(low, abs=1e-3)
        assert among[:, 0].max().item() == pytest.approx(high, abs=1e-3)

    def test_what_is_below_the_band(self):
        s = torch.tensor([1e-3, (1 - 1e-6) ** 0.5], dtype=F64)
        assert polar(s.diag(), first(JORDAN, 5))[0, 0].item() == pytest.approx(0.47, abs=5e-3)

    @pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (4, 3, 8)])
    @pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-12), (torch.float32, 2e-5)], ids=str)
    def test_polar_express_is_the_polar_factor(self, shape, dtype, bound):
        x = noise(0, *shape)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        made = polar(x.to(dtype), first(POLAR_EXPRESS, 12))
        torch.testing.assert_close(made.double(), u @ vh, rtol=0, atol=bound)

    @pytest.mark.parametrize("rows", [JORDAN, QUINTIC, POLAR_EXPRESS])
    def test_singular_values_take_the_path_of_numbers(self, rows):
        s = torch.tensor([0.0, 0.003, 0.04, 0.2, 0.95], dtype=F64)
        s = s / s.norm()
        made = singular(polar(with_singular(s, 8), first(rows, 4)))
        expected = on_numbers(first(rows, 4), s / (1 + 1e-7)).sort(descending=True).values
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)

    def test_turned_transposed_and_scaled_with_the_matrix(self):
        x, turn = noise(0, 4, 7), torch.linalg.qr(noise(1, 4, 4))[0]
        made = polar(x, first(JORDAN, 5))
        torch.testing.assert_close(polar(turn @ x, first(JORDAN, 5)), turn @ made)
        torch.testing.assert_close(polar(x.mT, first(JORDAN, 5)), made.mT)
        torch.testing.assert_close(polar(1e4 * x, first(JORDAN, 5)), made, rtol=0, atol=1e-5)

    def test_bfloat16_is_computed_in_float32(self):
        x = noise(0, 5, 9).bfloat16()
        made = polar(x, first(JORDAN, 5))
        assert torch.equal(made, polar(x.float(), first(JORDAN, 5)).bfloat16())

    def test_rows_past_the_last_repeat_it(self):
        assert first(QUINTIC, 2) == QUINTIC[:2]
        assert first(QUINTIC, 7) == (*QUINTIC, QUINTIC[-1], QUINTIC[-1])


class TestAlmostOrthogonalStart:
    def test_of_any_matrix_is_a_contraction(self):
        alike = torch.ones(6, 9, dtype=F64) + 1e-3 * noise(3, 6, 9)
        for x in (noise(0, 64, 256), noise(1, 30, 7), alike, with_singular(alike[:, 0], 9)):
            assert singular(polar(x, (), "aol")).max() <= 1 + 1e-12

    def test_is_nearer_than_that_of_the_norm(self):
        largest = {
            start: sum(singular(polar(noise(i, 64, 256), (), start)).max() for i in range(20)) / 20
            for start in ("frobenius", "aol")
        }
        assert largest["aol"].item() == pytest.approx(0.71, abs=0.01)
        assert largest["frobenius"].item() == pytest.approx(0.18, abs=0.01)

    def test_of_orthogonal_rows_is_the_polar_factor_itself(self):
        x = torch.linalg.qr(noise(0, 9, 4))[0].mT * torch.tensor([[3.0], [0.1], [20.0], [1.0]])
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        torch.testing.assert_close(polar(x, (), "aol"), u @ vh, rtol=0, atol=1e-9)


DEGENERATE = {
    "zero": torch.zeros(3, 4, dtype=F64),
    "rank one": noise(0, 3, 1) @ noise(1, 1, 4),
    "a zero row": noise(0, 3, 4) * torch.tensor([[1.0], [0.0], [1.0]]),
    "equal singular values": torch.eye(3, 4, dtype=F64),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
class TestSlopes:
    # Not at zero, where the slope is 1e7; abs in the other start has a kink at entries of 0.
    @pytest.mark.parametrize(
        ("start", "name"),
        [
            *(("frobenius", n) for n in DEGENERATE if n != "zero"),
            ("aol", "rank one"),
        ],
    )
    def test_are_right_to_second_order(self, name, start):
        x = DEGENERATE[name].clone().requires_grad_()

        def made(x):
            return polar(x, first(JORDAN, 3), start)

        assert torch.autograd.gradcheck(made, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(made, x)

    @pytest.mark.parametrize("name", DEGENERATE)
    @pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
    @pytest.mark.parametrize("of", ["polar", "aol", "inverse root"])
    def test_are_finite(self, of, dtype, name):
        x = DEGENERATE[name].to(dtype, copy=True).requires_grad_()
        if of == "inverse root":
            made = inverse_root(x @ x.mT) @ x
        else:
            made = polar(x, first(JORDAN, 5), "aol" if of == "aol" else "frobenius")
        (slope,) = torch.autograd.grad((made * (1 + made)).sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        assert made.isfinite().all() and slope.isfinite().all() and curvature.isfinite().all()

    def test_of_the_inverse_root_are_right(self):
        def made(x):
            return inverse_root(x @ x.mT)

        x = noise(0, 3, 5).requires_grad_()
        assert torch.autograd.gradcheck(made, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(made, x)


class TestInverseRoot:
    @pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-11), (torch.float32, 1e-4)], ids=str)
    def test_is_that_of_the_eigenvalues(self, dtype, bound):
        x = noise(0, 3, 6, 20)
        x = x @ x.mT
        values, vectors = torch.linalg.eigh(x)
        exact = vectors * values[:, None].rsqrt() @ vectors.mT
        made = inverse_root(x.to(dtype))
        assert made.dtype == dtype
        torch.testing.assert_close(made.double(), exact, rtol=0, atol=bound)

    @pytest.mark.parametrize(
        ("dtype", "value", "share"),
        [
            (F64, 1e-8, 1e-2),
            (F64, 1e-7, 1e-7),
            (torch.float32, 1e-4, 1e-2),
            (torch.float32, 1e-2, 1e-4),
        ],
        ids=str,
    )
    def test_of_small_eigenvalues_is_as_right_as_it_says(self, dtype, value, share):
        made = inverse_root(torch.tensor([1.0, value], dtype=dtype).diag())
        assert made[1, 1].item() * value**0.5 == pytest.approx(1, rel=share)

    @pytest.mark.parametrize(("dtype", "most"), [(F64, 22400), (torch.float32, 920)], ids=str)
    def test_of_eigenvalues_that_are_zero_is_bounded(self, dtype, most):
        made = inverse_root(torch.tensor([4.0, 0.0], dtype=dtype).diag())
        assert 0.98 * most < made[1, 1].item() * 2 < most

    def test_rank_deficient_matrices_do_not_explode_in_float32(self):
        # Without what is added, eigenvalues that rounding makes negative give entries of 4,000.
        x = noise(0, 64, 8) @ noise(1, 8, 128)
        made = inverse_root((x @ x.mT).float()).double()
        torch.testing.assert_close(
            singular(made @ x)[:8], torch.ones(8, dtype=F64), atol=1e-3, rtol=0
        )
        assert made.abs().max() < 920 / (x @ x.mT).norm().sqrt()
