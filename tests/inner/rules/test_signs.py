"""Rules whose steps go through signs and masks, where the contract does not look."""

import pytest
import torch

from hyperdescent.inner.registry import RULES, find_rule

F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def walk(rule, given, steps=6, shape=(3, 4)):
    """The weights after steps along gradients that do not depend on them."""
    rule = find_rule(rule)
    values = rule.values(given)
    p = noise(0, shape)
    s = rule.init(p, values)
    for step in range(1, steps + 1):
        p, s = rule(p, noise(step, shape), s, number(float(step)), values)
    return p


def test_lion_takes_its_sign_before_its_average_moves():
    # With beta1 = 0 the sign is of the gradient alone; with beta2 = 0 the average is the gradient
    # of the step before.
    g = torch.stack([noise(1, (5,)), noise(2, (5,))])
    lion = RULES["lion"]
    values = lion.values({"lr": 1.0, "beta1": 0.9, "beta2": 0.0})
    p, s = torch.zeros(5, dtype=F64), {"m": torch.zeros(5, dtype=F64)}
    p, s = lion(p, g[0], s, number(1.0), values)
    assert torch.equal(p, -g[0].sign())
    after, _ = lion(p, g[1], s, number(2.0), values)
    assert torch.equal(after - p, -(0.9 * g[0] + 0.1 * g[1]).sign())


def test_lion_without_a_second_average_is_signum():
    given = {"lr": 0.1, "weight_decay": 0.2}
    lion = walk("lion", given | {"beta1": 0.8, "beta2": 0.8})
    torch.testing.assert_close(lion, walk("signum", given | {"momentum": 0.8}), rtol=1e-13, atol=0)


def test_signum_without_momentum_is_signsgd():
    given = {"lr": 0.1, "weight_decay": 0.2}
    assert torch.equal(walk("signum", given | {"momentum": 0.0}), walk("signsgd", given))


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_size_of_gradients_is_nothing_to_signum(factor):
    signum = RULES["signum"]
    values = signum.values()
    p, g = noise(0, (7,)), noise(1, (7,))
    one, scaled = (
        signum(p, c * g, signum.init(p, values), number(1.0), values)[0] for c in (1.0, factor)
    )
    assert torch.equal(one, scaled)


@pytest.mark.parametrize("name", ["lion", "clion", "signsgd", "signum", "cadamw"])
def test_smooth_forms_end_in_the_rough_ones(name):
    given = {"lr": 0.1, "temperature": 1e-12}
    smooth = walk(RULES[name].choose(smooth=True), given)
    torch.testing.assert_close(smooth, walk(name, given), rtol=1e-12, atol=0)


def test_clion_is_lion_in_the_cautious_wrapper_but_for_the_scale():
    # Of n elements that agree, numel / (n + 1) and numel / n.
    given, p = {"lr": 0.1, "beta1": 0.9, "beta2": 0.5}, noise(0, (3, 4))
    seen, ways = set(), [[], []]
    for way, name in zip(ways, ("clion", "cautious(lion)"), strict=True):
        rule = find_rule(name)
        values = rule.values(given)
        s = rule.init(p, values)
        for step in range(1, 7):
            after, s = rule(p, noise(step, (3, 4)), s, number(float(step)), values)
            way.append(p - after)
    for ours, wrapped in zip(*ways, strict=True):
        agreeing = int((wrapped != 0).sum())
        seen.add(agreeing)
        torch.testing.assert_close(
            ours * (agreeing + 1), wrapped * agreeing, rtol=1e-12, atol=1e-13
        )
    assert len(seen) > 1, "the mask is the same at every step"


def test_a_tensor_of_one_element_is_halved_by_clion_and_not_by_cadamw():
    p, g = number([0.0]), number([3.0])
    for name, expected in (("clion", -0.5), ("cadamw", -1.0)):
        rule = RULES[name]
        values = rule.values({"lr": 1.0} | ({"eps": 0.0} if name == "cadamw" else {}))
        after, _ = rule(p, g, rule.init(p, values), number(1.0), values)
        torch.testing.assert_close(after, number([expected]), rtol=1e-12, atol=0)


def test_cadamw_is_adamw_where_all_agrees():
    # A constant gradient agrees with its average everywhere; eps is where they differ.
    p, g = noise(0, (4,)), noise(1, (4,))
    given = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.1}
    ends = []
    for name in ("cadamw", "adamw"):
        rule, q = RULES[name], p
        values = rule.values(given)
        s = rule.init(q, values)
        for step in range(1, 6):
            q, s = rule(q, g, s, number(float(step)), values)
        ends.append(q)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_cadamw_moves_only_what_agrees_and_further():
    # After a step along (1, 1, 1, 1) the last of (1, 1, 1, -0.5) disagrees with the average.
    cadamw = RULES["cadamw"]
    values = cadamw.values({"lr": 1.0, "eps": 0.0})
    p = torch.zeros(4, dtype=F64)
    p, s = cadamw(p, torch.ones(4, dtype=F64), cadamw.init(p, values), number(1.0), values)
    after, _ = cadamw(p, number([1.0, 1.0, 1.0, -0.5]), s, number(2.0), values)
    torch.testing.assert_close(after - p, number([-4 / 3] * 3 + [0.0]), rtol=1e-12, atol=0)
