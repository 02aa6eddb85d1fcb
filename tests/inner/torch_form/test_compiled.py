"""Steps by generated code: the rule's, whatever the values, and a word where there is none."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hyperdescent.inner.core.hyper import learning_rate
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form import optimizer as optim
from hyperdescent.inner.torch_form.compiled import compiled_step
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
SHAPES = [(16, 8), (64,), (16, 8), (), (8, 4, 2, 2)]
COMPOSED = ["cautious(muon)", "clip_norm(adamw)", "ema(sgd)", "partition(muon, adamw)"]
ALL = [*RULES.values(), *map(find_rule, COMPOSED)]
# What they draw is from torch's own stream, or a value decides what they do.
PLAIN: dict[str, str] = {}


@pytest.fixture
def enabled(monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    compiled_step.cache_clear()
    yield
    compiled_step.cache_clear()


@pytest.fixture
def traced(enabled, monkeypatch):
    """What would be compiled runs as it was traced, so that no test waits for a C++ compiler."""
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)


@pytest.fixture
def compiler(enabled):
    """Code is generated; how many graphs there were is in the counters."""
    from torch._dynamo import config, reset
    from torch._dynamo.utils import counters

    with config.patch(disable=False):
        counters.clear()
        yield counters["stats"]
    reset()


def noise(seed, shape, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def trained(of, *, compile, dtype=F64, shapes=SHAPES, steps=4):
    """(weights, those to use, slots) after some steps, along which rates change."""
    params = [nn.Parameter(noise(i, shape, dtype)) for i, shape in enumerate(shapes)]
    optimizer = torch_form(of)(params, compile=compile)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = noise(100 * step + i, p.shape, dtype)
        optimizer.step(loss=3.0 / (1 + step))
        scheduler.step()
    weights = [p.detach().clone() for p in params]
    slots = [dict(optimizer.state[p]) for p in params]
    optimizer.eval()
    return weights, [p.detach() for p in params], slots


def assert_alike(of, dtype, bound, **given):
    ours, plain = (trained(of, compile=each, dtype=dtype, **given) for each in (True, False))
    torch.testing.assert_close(ours, plain, rtol=bound, atol=bound)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.name)
def test_what_is_compiled_is_the_rule(rule, traced):
    # The same operations, apart from numbers that are made in another order.
    assert_alike(rule, F64, 1e-11)


@pytest.mark.parametrize("name", ["adamw", "ema(sgd)", "muon", "clip_norm(adamw)"])
def test_compiled_it_is_the_rule_but_for_rounding(name, compiler):
    assert_alike(name, torch.float32, 256 * torch.finfo(torch.float32).eps, steps=3)
    assert compiler["unique_graphs"] > 0


def test_neither_values_nor_lengths_are_compiled_anew(compiler):
    params = [nn.Parameter(torch.ones(n)) for n in (70_000, 80_001, 90_002)]
    optimizer = optim.AdamW(params, compile=True)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    made = compiler["unique_graphs"]
    for rate in (0.1, 0.2, 0.3):
        optimizer.param_groups[0].update(lr=rate, betas=(rate, 0.9), weight_decay=rate)
        step()
    assert compiler["unique_graphs"] == made == 1


def test_slots_and_weights_stay_where_they_are(traced):
    p = nn.Parameter(torch.ones(70_000))
    optimizer = optim.AdamW([p], compile=True)
    places = []
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        places.append([x.data_ptr() for x in (p, *optimizer.state[p].values())])
    assert places[0] == places[1]


@rule("Choosing", over="tensor", lr=learning_rate(0.1))
def choosing(p, g, s, t, lr):
    return p - lr * (g / 2 if g.abs().max() > 1 else g), s


@rule("Drawing", over="tensor", lr=learning_rate(0.1))
def drawing(p, g, s, t, lr):
    return p - lr * g * torch.rand_like(g), s


class TestWithout:
    """A slow path is never silent, and takes the same steps."""

    @pytest.mark.parametrize(
        ("of", "why"),
        [(choosing, "Choosing.*compile=True.*data-dep|Choosing.*"), (drawing, "draws")],
    )
    def test_a_rule_that_cannot_be_is_told_once(self, of, why, traced):
        def run(compile):
            torch.manual_seed(0)
            p = nn.Parameter(noise(0, (8, 8)))
            optimizer = torch_form(of)([p], compile=compile)
            for step in range(3):
                p.grad = noise(step, (8, 8))
                optimizer.step()
            return p.detach()

        with pytest.warns(UserWarning, match=why) as told:
            compiled = run(True)
        assert len(told) == 1
        assert torch.equal(compiled, run(False))

    def test_no_compiler(self, traced, monkeypatch):
        def broken(*inputs):
            raise RuntimeError("no C++ compiler was found\nlook here")

        monkeypatch.setattr(torch, "compile", lambda graph, **options: broken)
        with pytest.warns(
            UserWarning, match="of AdamW .*RuntimeError: no C\\+\\+ compiler was found$"
        ):
            compiled = trained("adamw", compile=True, shapes=[(8, 8)])
        torch.testing.assert_close(compiled, trained("adamw", compile=False, shapes=[(8, 8)]))

    def test_one_that_is_switched_off(self):
        compiled_step.cache_clear()
        with pytest.warns(UserWarning, match="TORCH_COMPILE_DISABLE=1 is set"):
            trained("adamw", compile=True, shapes=[(8, 8)], steps=1)
        compiled_step.cache_clear()


class TestSaving:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_is_compiled_too(self, copied, traced):
        optimizer = optim.AdamW([nn.Parameter(torch.ones(3))], compile=True)
        assert copied(optimizer)._compile and not copied(optim.AdamW([torch.ones(3)]))._compile

    def test_a_state_dict_does_not_say_it(self, traced):
        p = nn.Parameter(torch.ones(64))
        ours, plain = optim.AdamW([p], compile=True), optim.AdamW([p])
        p.grad = torch.ones(64)
        ours.step()
        assert ours.state_dict()["param_groups"][0].keys() == plain.param_groups[0].keys()
        plain.load_state_dict(ours.state_dict())
        assert torch.equal(plain.state[p]["m"], ours.state[p]["m"])
