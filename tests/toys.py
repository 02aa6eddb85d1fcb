"""Problems that are two functions of one vector w and of hypers, with answers known in full."""

import torch

from hyperdescent.inner.core.hyper import Hyper
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.problem import Problem
from hyperdescent.meta.training.training import Training

DOUBLE = torch.float64


def vector(*numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


def number(shape=()):
    """A hyper that may be any number, or as many."""
    return Hyper(0.0, -1e6, 1e6, "linear", (-1.0, 1.0), shape=shape)


class Toy(Problem):
    """inner(w, hypers) is the training loss, outer(w, hypers) the held-out one."""

    name, choices, chosen, splits = "toy", {}, {}, ("valid",)  # never changed

    def __init__(self, inner, outer, w, **hypers):
        self.inner, self.outer, self.w = inner, outer, w
        self.hypers = {name: number(tuple(shape)) for name, shape in hypers.items()}

    def choose(self, **chosen):
        return self

    def start(self, seed):
        return {"w": self.w.clone()}, {}

    def batch(self, step, seed):
        return ()

    def inner_loss(self, params, buffers, hypers, batch):
        return self.inner(params["w"], hypers), buffers

    def outer_loss(self, params, buffers, hypers):
        return self.outer(params["w"], hypers)

    def measure(self, params, buffers, split):
        return {"loss": float(self.outer(params["w"], {}))}


def descent(toy, steps, lr, **options):
    """Plain gradient descent on a toy."""
    return Training(toy, find_rule("sgd"), steps, values={"lr": lr} | options.pop("values", {}))


def following(scale):
    """Inner (w - x)' G (w - x) / 2 with G = diag(scale): the weights follow the hyper x."""

    def inner(w, hypers):
        return (scale * (w - hypers["x"]) ** 2).sum() / 2

    return inner
