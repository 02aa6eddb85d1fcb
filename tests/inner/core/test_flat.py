"""The step in place: the bits of the step out of place, in the memory of its inputs."""

from functools import partial

import pytest
import torch
from points import EVERY_RULE, allowed, values_in_nets
from torch import nn

from hyperdescent.inner.core.flat import BLOCK, flat_step, flat_step_, initial_slots
from hyperdescent.inner.core.hyper import learning_rate
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.core.slots import Slot, zeros
from hyperdescent.inner.registry import RULES
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.training import Training

SIZE = 200  # Three blocks, and a part of one.
LONG = BLOCK + 1  # From there on a training writes in place.


@rule("Swap", slots={"last": zeros, "other": zeros}, lr=learning_rate(0.1))
def swap(p, g, s, t, lr):
    """Slots that are other tensors of the state, which a careless writer would overwrite first."""
    return s["other"] - lr * g, {"last": p, "other": s["last"]}


in_blocks = partial(flat_step_, block=64)


def trained(step, found, values, clone, steps=5):
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(SIZE, generator=draw)
    layout = Layout(("w",), (p.shape,))
    slots = initial_slots(found, layout, p, values)
    for i in range(steps):
        t = torch.tensor(float(i + 1), dtype=torch.float64)
        g = torch.randn(SIZE, generator=draw)
        before = p.clone() if clone else p, {n: x.clone() for n, x in slots.items()}
        # Above every floor that a rule may know.
        loss = 1 + before[0].square().mean()
        p, slots = step(found, layout, before[0], g, before[1], t, values, loss=loss)
    return p, slots, before[0]


@pytest.mark.parametrize("granularity", ["shared", "element"])
@pytest.mark.parametrize("found", [*EVERY_RULE.values(), swap], ids=lambda rule: rule.name)
def test_it_has_the_bits_of_the_other(found, granularity):
    sizes = {"shared": (), "tensor": (1,), "element": (SIZE,)}
    values = found.values(
        {
            name: torch.full(sizes[allowed(found.hypers[name], granularity)], value).double()
            for name, value in values_in_nets(found).items()
        }
    )
    p, slots, _ = trained(flat_step, found, values, clone=True)
    here, slots_here, _ = trained(in_blocks, found, values, clone=True)
    assert torch.equal(p, here)
    for n, x in slots.items():
        assert torch.equal(x, slots_here[n]) and x.dtype == slots_here[n].dtype


def test_it_writes_where_it_reads():
    found = RULES["adam"]
    p, _, before = trained(in_blocks, found, found.values(), clone=False)
    assert p.data_ptr() == before.data_ptr()


@rule("Anchored", slots={"anchor": Slot(lambda p, values, layout: p)}, lr=learning_rate(0.1))
def anchored(p, g, s, t, lr):
    return p - lr * (g + p - s["anchor"]), s


class Previous(nn.Module):
    """A buffer that is the weights of the step before."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, LONG) / LONG)
        self.register_buffer("previous", torch.zeros(LONG))

    def forward(self, x):
        apart = self.w - 0.5 * self.previous
        self.previous = self.w.detach()
        return x @ apart


@pytest.mark.parametrize(
    ("make", "of"), [(Previous, RULES["sgd"]), (lambda: nn.Linear(LONG, 1, bias=False), anchored)]
)
def test_a_state_that_shares_memory_is_not_overwritten(make, of):
    x = torch.randn(8, LONG, generator=torch.Generator().manual_seed(0))
    problem = problem_from_module(
        make,
        lambda out, y: (out.flatten() - y).square().mean(),
        (x, x[:, 0]),
        (x, x[:, 1]),
        batch_size=8,
    )
    run = Training(problem, of, 6, values={"lr": 1e-3})
    resolved = run.resolve({})
    here = run_training(run, resolved, 0, start=run.begin(resolved.at(0), 0), overwrite=True).state
    apart = run.begin(resolved.at(0), 0)
    for i in range(run.steps):
        apart = run.step(apart, resolved.at(i), i, 0)
    assert torch.equal(here.p, apart.p)
    assert all(torch.equal(b, here.buffers[n]) for n, b in apart.buffers.items())
