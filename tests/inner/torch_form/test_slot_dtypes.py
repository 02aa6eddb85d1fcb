"""Slots of more digits than the weights keep them."""

import copy
import io
import pickle

import pytest
import torch

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form


def saved(optimizer, fresh):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


WAYS = {
    "state_dict": saved,
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
}


def built(rule):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), ()]
    params = [
        torch.nn.Parameter(torch.randn(x, generator=generator).to(torch.bfloat16)) for x in shapes
    ]
    return torch_form(rule)(params)


def steps(optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step(**({"loss": 1.0} if "loss" in optimizer.rule.needs else {}))


def slots(optimizer):
    """All of them: those of each parameter, and those that belong to the group."""
    (group,) = optimizer.param_groups
    own = [x for p in group["params"] for x in optimizer.state[p].values()]
    return own + [group[n] for n in optimizer.rule.slots if n in group]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_slots_of_bfloat16_weights_keep_their_dtypes(rule, way):
    optimizer = built(rule)
    steps(optimizer, range(3))
    before = [x.clone() for x in slots(optimizer)]
    kept = WAYS[way](optimizer, built(rule))
    for old, new in zip(before, slots(kept), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert torch.equal(new, old)
    # Nor does a step change them.
    steps(kept, [3])
    assert [x.dtype for x in slots(kept)] == [x.dtype for x in before]


@pytest.mark.parametrize(
    ("name", "slot"),
    [("dynag", "alpha"), ("dynag", "rms_start"), ("subsetnorm", "v"), ("snsm", "v")],
)
def test_running_sums_of_bfloat16_weights_are_float32(name, slot):
    optimizer = built(RULES[name])
    steps(optimizer, range(3))
    loaded = saved(optimizer, built(RULES[name]))
    assert {x[slot].dtype for x in loaded.state.values()} == {torch.float32}
