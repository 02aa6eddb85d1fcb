import pytest
import torch
from oracles.frugal import Frugal

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

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
    p, _ = run(RULES["frugal"].choose(projector=projector, density=1.0), 20, lr=0.1)
    torch.testing.assert_close(p, run(RULES["adamw"], 20, lr=0.1)[0], rtol=1e-13, atol=0)


@PROJECTORS
def test_none_of_it_is_signsgd(projector):
    frugal = RULES["frugal"].choose(projector=projector, density=0.0)
    p, s = run(frugal, 1, lr=0.1, weight_decay=0.0, inactive_lr_scale=0.5)
    assert torch.equal(p, normal(100) - 0.1 * (0.5 * normal(1).sign()))
    assert s["m"].numel() == s["v"].numel() == 0


@pytest.mark.parametrize("density", RULES["frugal"].choices["density"].options)
@PROJECTORS
def test_any_share_is_a_plain_loop(projector, density):
    # Sixteenths of both sides are whole, and those of the convolution are rounded down.
    shapes = [(16, 32), (5, 3, 2, 2)]
    ours, theirs = ([torch.nn.Parameter(normal(0, x)) for x in shapes] for _ in range(2))
    defaults = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    scales = {"proj_params_lr_scale": 0.7, "inactive_lr_scale": 0.3, "temperature": 1e-3}
    options = {"projector": projector, "density": density, "update_gap": 4}
    given = defaults | scales | options | {"smooth": False, "seed": 5}
    pairs = ((ours, torch_form(RULES["frugal"])), (theirs, Frugal))
    steppers = [(params, make(params, **given)) for params, make in pairs]
    for step in range(1, 11):
        for params, optimizer in steppers:
            for p in params:
                p.grad = normal(step, p.shape)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("projector", "kept"), [("columns", (8, 3)), ("rows", (2, 12)), ("randk", (1, 24))]
)
def test_only_the_active_part_has_moments(projector, kept):
    frugal = RULES["frugal"].choose(projector=projector)
    for shape in (SHAPE, (8, 3, 2, 2)):
        s = frugal.init(torch.zeros(shape), frugal.values())
        assert {n: x.shape for n, x in s.items()} == {"m": kept, "v": kept}
    assert frugal.init(torch.zeros(7), frugal.values())["m"].shape == (7,)


@PROJECTORS
def test_another_quarter_has_a_state_after_every_gap(projector):
    frugal = RULES["frugal"].choose(projector=projector, update_gap=4)
    count = {"columns": (1, 12), "rows": (8, 1), "randk": SHAPE}[projector]
    given = {"lr": 0.1, "weight_decay": 0.0, "inactive_lr_scale": 0.0}
    ends = [normal(100), *(run(frugal, steps, **given)[0] for steps in range(1, 6))]
    seen = []
    for step in (1, 4, 5):
        active = ends[step] != ends[step - 1]
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


def test_betas_may_be_each_entrys_own():
    # Along whole rows, because the chosen columns of one do not care about another.
    frugal = RULES["frugal"].choose(update_gap=3)
    beta1 = torch.linspace(0.5, 0.9, 8, dtype=F64)
    together, _ = run(frugal, 5, lr=0.1, beta1=beta1[:, None].expand(SHAPE))
    for row, beta in enumerate(beta1):
        torch.testing.assert_close(together[row], run(frugal, 5, lr=0.1, beta1=beta)[0][row])


@PROJECTORS
def test_weights_without_entries_are_left_alone(projector):
    p, _ = run(RULES["frugal"].choose(projector=projector), 2, (0, 3))
    assert p.shape == (0, 3)
