"""Steps to the far side of a norm's ball: their lengths in it, and what they do not depend on."""

import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.scion import LMONorm

from hyperdescent.inner.registry import RULES

F64 = torch.float64
NORMS = RULES["scion"].choices["norm"].options


def number(x):
    return torch.tensor(x, dtype=F64)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def direction(norm, g, **given):
    """Minus the step of rate 1 from 0."""
    rule = RULES["scion"].choose(norm=norm)
    values = rule.values({"lr": 1.0, **given})
    p = torch.zeros_like(g)
    return -rule(p, g, rule.init(p, values), number(1.0), values)[0]


def rms(x, dim):
    return x.square().mean(dim).sqrt()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_spectral_steps_have_the_singular_vectors_and_nearly_even_values(shape):
    g = noise(0, shape)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    inside = u.mT @ direction("spectral", g) @ v.mT * (shape[1] / shape[0]) ** 0.5
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-10
    alive = s / s.norm() > 0.01  # Five steps do not lift what is far below.
    assert (inside.diagonal()[alive] > 0.6).all() and (inside.diagonal() < 1.25).all()


def test_a_kernels_step_is_that_of_its_matrix_over_its_root():
    g = noise(0, (4, 3, 2, 2))
    matrix = direction("spectral", g.view(4, 12))
    # sqrt(4 / 3) / 4 in place of sqrt(4 / 12).
    torch.testing.assert_close(direction("spectral", g).view(4, 12), matrix / 2, rtol=1e-12, atol=0)


def test_lengths_of_rows_columns_and_entries():
    g = noise(0, (4, 9))
    given = {"eps": 0.0}
    torch.testing.assert_close(rms(direction("col", g, **given), 0), torch.ones(9, dtype=F64))
    length = direction("row", g, **given).norm(dim=1)
    torch.testing.assert_close(length, torch.full((4,), 1 / 3, dtype=F64))
    torch.testing.assert_close(direction("sign", g, **given), g.sign() / 9)
    bias = noise(1, (8,))
    torch.testing.assert_close(direction("spectral", bias, **given), bias / rms(bias, 0))


def test_l1_moves_the_steepest_coordinate_and_shares_among_ties():
    g = number([[1.0, -3.0], [2.0, 0.0]])
    torch.testing.assert_close(direction("l1", g), number([[0.0, -1.0], [0.0, 0.0]]))
    tied = direction("l1", number([2.0, -2.0, 1.0]))
    torch.testing.assert_close(tied, number([0.5, -0.5, 0.0]))


@pytest.mark.parametrize("norm", NORMS)
def test_the_size_of_gradients_is_nothing_to_any_norm(norm):
    g = noise(0, (4, 9))
    one, more = direction(norm, g, eps=0.0), direction(norm, 1e5 * g, eps=0.0)
    torch.testing.assert_close(one, more, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_descends(norm):
    for shape in [(4, 9), (9, 4), (7,), (3, 2, 2, 2), (1,)]:
        g = noise(1, shape)
        assert (g * direction(norm, g)).sum() > 0


@pytest.mark.parametrize("norm", ["sign", "col", "row"])
def test_matrices_move_as_in_another_library(norm):
    # Its spectral norm is in bfloat16; its momentum, as the authors', is the share of the new.
    start, given = noise(0, (4, 9)), {"lr": 0.1, "scale": 3.0}
    kind = {"sign": LMONorm.SIGN, "col": LMONorm.COL, "row": LMONorm.ROW}[norm]
    theirs = torch.nn.Parameter(start.clone())
    other = pytorch_optimizer.SCION(
        [theirs], momentum=0.2, norm_type=kind, constraint=True, foreach=False, **given
    )
    rule = RULES["scion"].choose(norm=norm)
    values = rule.values(given | {"beta": 0.8, "eps": 1e-8 if norm != "sign" else 0.0})
    p, s = start, rule.init(start, values)
    for step in range(1, 20):
        theirs.grad = noise(step, (4, 9))
        other.step()
        p, s = rule(p, noise(step, (4, 9)), s, number(float(step)), values)
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_is_stepped_in_float32(norm):
    g = noise(0, (16, 16)).bfloat16()
    step = direction(norm, g)
    assert step.dtype == torch.bfloat16
    torch.testing.assert_close(step, direction(norm, g.float()).bfloat16(), rtol=0, atol=0)


def test_constrained_weights_stay_in_their_ball():
    rule = RULES["scion"].choose(norm="sign")
    values = rule.values({"lr": 0.3, "scale": 8.0, "beta": 0.5})
    p = torch.zeros(2, 4, dtype=F64)
    s = rule.init(p, values)
    g = number([[1.0], [-1.0]]).expand(2, 4)
    for step in range(1, 200):
        p, s = rule(p, g, s, number(float(step)), values)
        assert p.abs().max() <= 8.0 / 4 + 1e-12
    torch.testing.assert_close(p, number([[-2.0], [2.0]]).expand(2, 4), rtol=1e-6, atol=0)


def test_normalized_sgd_moves_every_tensor_by_its_rate():
    rule = RULES["normalizedsgd"]
    values = rule.values({"lr": 0.3, "eps": 0.0})
    for size in (1e-8, 1.0, 1e8):
        p, g = noise(0, (2, 3, 2, 2)), size * noise(1, (2, 3, 2, 2))
        after, _ = rule(p, g, rule.init(p, values), number(1.0), values)
        torch.testing.assert_close((p - after).norm(), number(0.3), rtol=1e-12, atol=0)
        torch.testing.assert_close(p - after, 0.3 * g / g.norm(), rtol=1e-12, atol=1e-14)


def test_decay_keeps_normalized_sgd_within_its_inverse():
    rule = RULES["normalizedsgd"]
    values = rule.values({"lr": 0.1, "weight_decay": 0.5})
    p = torch.zeros(4, dtype=F64)
    s = rule.init(p, values)
    for step in range(1, 400):
        p, s = rule(p, -torch.ones(4, dtype=F64), s, number(float(step)), values)
        assert p.norm() <= 2.0
    torch.testing.assert_close(p.norm(), number(2.0), rtol=1e-6, atol=0)
