import pytest
import torch

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.rules.dynag import shrinking

F64 = torch.float64


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def number(x):
    return torch.tensor(x, dtype=F64)


def run(rule, gradients, **given):
    values = rule.values(given)
    p = torch.zeros_like(gradients[0])
    s = rule.init(p, values)
    for step, g in enumerate(gradients, start=1):
        before = p
        p, s = rule(p, g, s, number(step), values)
    return before - p, s


@pytest.mark.parametrize("p_star", [0.05, 0.3])
def test_the_share_beyond_tau_becomes_p_star_for_normal_gradients(p_star):
    gradients = [normal(seed, 100_000) for seed in range(60)]
    _, s = run(RULES["dynag"], gradients, p_star=p_star, alpha_decay=0.8)
    # Of 100 000 entries the share has a standard deviation below 0.0015.
    torch.testing.assert_close(s["saturation"], number(p_star), rtol=0, atol=0.005)


def test_its_step_is_alphagrads_at_the_alpha_that_it_found():
    gradients = [normal(seed, 4, 5) for seed in range(5)]
    moved, s = run(RULES["dynag"], gradients, lr=0.1, k=3.0)
    alphagrad, s_of_it = RULES["alphagrad"], RULES["alphagrad"].init(moved, {})
    values = alphagrad.values({"lr": 0.3, "alpha": s["alpha"], "eps": 1e-5})
    p, _ = alphagrad(torch.zeros_like(moved), gradients[-1], s_of_it, number(1.0), values)
    torch.testing.assert_close(moved, -p, rtol=1e-13, atol=0)


def test_alpha_is_less_for_a_small_part_of_a_large_model():
    (alone, part) = (
        run(RULES["dynag"].choose(model_size=size), [normal(0, 8)], alpha_decay=0.0)[1]["alpha"]
        for size in (0, 8 * 1000)
    )
    torch.testing.assert_close(part, alone / 10, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("step", "rms", "s"), [(10, 0.1, 1.0), (11, 0.1, 1.0), (12, 0.1, 0.4), (12, 2.0, 1.0)]
)
def test_updates_shrink_with_their_size_after_the_warm_up(step, rms, s):
    sizes = {"rms": number(rms), "rms_start": number(1.0)}
    found = shrinking(sizes, number(step), 10, number(0.3), number(0.1))
    torch.testing.assert_close(found, number(s), rtol=1e-13, atol=0)
