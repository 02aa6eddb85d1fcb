import pytest
import torch

from hyperdescent.inner.rules import RULES

F64 = torch.float64
PROJECTORS = pytest.mark.parametrize("projector", ["columns", "rows", "randk"])
SHAPE = (8, 12)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(rule, steps, shape=SHAPE, **given):
    values = rule.values(given)
    p = normal(100, shape)
    s = rule.init(p, values)
    for step in range(1, steps + 1):
        p, s = rule(p, normal(step, shape), s, torch.tensor(step, dtype=F64), values)
    return p, s


@PROJECTORS
def test_all_of_it_is_adamw(projector):
    p, _ = run(RULES["frugal"].choose(projector=projector), 20, lr=0.1, density=1.0)
    torch.testing.assert_close(p, run(RULES["adamw"], 20, lr=0.1)[0], rtol=1e-13, atol=0)


@PROJECTORS
def test_none_of_it_is_signsgd(projector):
    frugal = RULES["frugal"].choose(projector=projector)
    p, _ = run(frugal, 1, lr=0.1, density=0.0, weight_decay=0.0, inactive_lr_scale=0.5)
    assert torch.equal(p, normal(100) - 0.1 * (0.5 * normal(1).sign()))


@PROJECTORS
def test_another_quarter_has_a_state_after_every_gap(projector):
    frugal = RULES["frugal"].choose(projector=projector, update_gap=4)
    count = {"columns": (1, 12), "rows": (8, 1), "randk": SHAPE}[projector]
    seen = []
    for steps in (1, 4, 5):
        _, s = run(frugal, steps)
        active = s["v"] > 0
        assert torch.equal(active, s["m"] != 0)
        assert active.sum() == SHAPE[0] * SHAPE[1] / 4
        lines = active.any(0, keepdim=True) if count[0] == 1 else active
        lines = lines.any(1, keepdim=True) if count[1] == 1 else lines
        assert torch.equal(active, lines.expand(SHAPE))
        seen.append(active)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_bias_correction_begins_anew_with_the_state():
    # Without history, Adam's step is the sign of the gradient: the whole matrix moves by lr.
    frugal = RULES["frugal"].choose(update_gap=4)
    given = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.0}
    step = run(frugal, 4, **given)[0] - run(frugal, 5, **given)[0]
    torch.testing.assert_close(step, 0.1 * normal(5).sign(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("projector", ["columns", "rows", "randk"])
def test_a_convolution_is_its_matrix(projector):
    frugal = RULES["frugal"].choose(projector=projector, update_gap=3)

    def end(shape):
        values = frugal.values({"lr": 0.1})
        p = normal(0).view(shape)
        s = frugal.init(p, values)
        for step in range(1, 6):
            g = normal(step).view(shape)
            p, s = frugal(p, g, s, torch.tensor(step, dtype=F64), values)
        return p.reshape(SHAPE)

    torch.testing.assert_close(end((8, 3, 2, 2)), end(SHAPE), rtol=1e-15, atol=0)


def test_vectors_are_adamws():
    frugal = RULES["frugal"].choose(update_gap=2)
    ours, _ = run(frugal, 10, (7,), lr=0.1, proj_params_lr_scale=5.0)
    assert torch.equal(ours, run(RULES["adamw"], 10, (7,), lr=0.1)[0])
