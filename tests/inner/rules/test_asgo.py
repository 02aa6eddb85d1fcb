"""ASGO and DASGO beyond what tests/contracts asks."""

import pytest
import torch

from hyperdescent.inner.registry import RULES

F64 = torch.float64


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def path(rule, grads, **given):
    values = rule.values({"lr": 1.0, "weight_decay": 0.0} | given)
    p = torch.zeros_like(grads[0])
    s = rule.init(p, values)
    for t, g in enumerate(grads, 1):
        p, s = rule(p, g, s, torch.tensor(float(t), dtype=F64), values)
    return p, s


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (4, 3, 3, 1)])
def test_asgos_first_step_is_muons_with_an_exact_polar_factor(shape):
    g = noise(0, *shape)
    u, _, vh = torch.linalg.svd(g.view(len(g), -1), full_matrices=False)
    moved, s = path(RULES["asgo"], [g])
    assert s["v"].shape == (min(u.shape[0], vh.shape[1]),) * 2
    # Moonlight's scale, 0.2 sqrt(max(m, n)).
    expected = -0.2 * max(u.shape[0], vh.shape[1]) ** 0.5 * (u @ vh)
    torch.testing.assert_close(moved.view_as(expected), expected, rtol=0, atol=1e-10)


def test_asgo_turns_with_its_weights():
    left, right = (torch.linalg.qr(noise(i, n, n))[0] for i, n in ((8, 4), (9, 6)))
    grads = [noise(t, 4, 6) for t in range(5)]
    plain, _ = path(RULES["asgo"], grads)
    turned, _ = path(RULES["asgo"], [left @ g @ right for g in grads])
    torch.testing.assert_close(turned, left @ plain @ right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["asgo", "dasgo"])
def test_steps_have_adamws_size_whatever_the_gradients(name):
    for size in (1e3, 1.0, 1e-2):
        moved, _ = path(RULES[name], [size * noise(0, 6, 10)], lr=0.5)
        assert moved.square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-9)


def test_averages_of_low_rank_have_a_root_in_float32():
    # Rank 3 of 24 at each step: without what is added to eigenvalues, rounding made some negative
    # and the step was up to 100% noise.
    grads = [noise(t, 24, 3) @ noise(t + 100, 3, 40) for t in range(4)]
    exact, _ = path(RULES["asgo"], grads, beta2=0.5)
    short, s = path(RULES["asgo"], [g.float() for g in grads], beta2=0.5)
    assert s["v"].dtype == torch.float32
    assert ((short - exact).norm() / exact.norm()).item() < 0.02


def test_bfloat16_weights_keep_second_moments_in_float32():
    for name in ("asgo", "dasgo"):
        moved, s = path(RULES[name], [noise(0, 4, 6).bfloat16()] * 3)
        assert (moved.dtype, s["v"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", ["asgo", "dasgo"])
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_what_never_had_a_gradient_stays(name, dtype):
    moved, _ = path(RULES[name], [torch.zeros(3, 5, dtype=dtype)] * 3)
    assert torch.equal(moved, torch.zeros(3, 5, dtype=dtype))


def test_dasgos_first_step_has_columns_of_one_length():
    g = noise(0, 6, 10)
    moved, s = path(RULES["dasgo"], [g], eps=0.0)
    assert s["v"].shape == (10,)
    columns = -moved / g
    torch.testing.assert_close(columns * g.norm(dim=0), columns[0, 0] * g[:, :1].norm() + 0 * g)
    torch.testing.assert_close(moved.norm(dim=0), torch.full((10,), 0.2 * 6**0.5, dtype=F64))
