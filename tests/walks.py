"""A rule's way along given gradients, which asks nothing of the weights."""

import torch

from hyperdescent.inner.registry import RULES

F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def walk(name, gradients, values=None, **options):
    """Weights and slots after every step, from weights of 1."""
    rule = RULES[name].choose(**options)
    values = rule.values(values)
    p = torch.ones_like(gradients[0])
    s, seen = rule.init(p, values), []
    for step, g in enumerate(gradients, 1):
        p, s = rule(p, g, s, number(float(step)), values)
        seen.append((p, s))
    return seen
