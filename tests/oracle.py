"""Independent references for rules: other libraries' optimizers, and plain loops in numpy.

A module of tests/oracles says in REFERENCE which rule is checked against what.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class Reference:
    """make(params, **given) -> an optimizer. translate: from our arguments to its own; ours, with
    betas as a tuple and every option. own_defaults: its defaults are checked to be ours. tolerance:
    absolute and relative, in float64; why: the reason for more than rounding.

    Of the rule, for all its tests: point, values at which every hyper matters, where those common
    to all rules are none; chosen, numbers among the options in place of their defaults; rough,
    the hypers that declare why their derivative is no use.
    """

    make: Callable
    translate: Callable[[dict], dict] = dict
    own_defaults: bool = False
    tolerance: float = 1e-12
    why: str = ""
    point: dict = field(default_factory=dict)
    chosen: dict = field(default_factory=dict)
    rough: frozenset = frozenset()


class Plain(torch.optim.Optimizer):
    """An optimizer whose subclass writes the published equations in numpy, in float64.

    update(p, g, s, t, **given) -> p for one tensor of at least one dimension, s a dict of its own;
    with model=True p and g are lists of all tensors, and so is what comes back.
    """

    model = False

    def __init__(self, params, **given):
        super().__init__(params, given)
        self.t = 0

    def update(self, p, g, s, t, **given):
        raise NotImplementedError

    def step(self, loss=None):
        self.t += 1
        (group,) = self.param_groups
        given = {n: x for n, x in group.items() if n != "params"}
        if "loss" in inspect.signature(self.update).parameters:
            given["loss"] = float(loss)
        params = group["params"]
        before = [np.atleast_1d(p.detach().numpy()).copy() for p in params]
        grads = [np.atleast_1d(p.grad.numpy()).copy() for p in params]
        if self.model:
            after = self.update(before, grads, self.state["all"], self.t, **given)
        else:
            pairs = zip(params, before, grads, strict=True)
            after = [self.update(p, g, self.state[q], self.t, **given) for q, p, g in pairs]
        for q, p in zip(params, after, strict=True):
            q.data.copy_(torch.from_numpy(np.asarray(p)).view_as(q))


def references():
    """Every reference by the name of its rule."""
    import oracles

    found = {}
    for module in pkgutil.iter_modules(oracles.__path__):
        for name, made in importlib.import_module(f"oracles.{module.name}").REFERENCE.items():
            assert name not in found, f"{name} has two references"
            found[name] = made
    return found
