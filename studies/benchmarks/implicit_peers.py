"""The same implicit hypergradient by other libraries, each as its users would write it.

Every peer starts from the same trained weights, penalties, data, number of products and step size.
Where it cannot do what is asked, it gets the least patch that lets it, which its note names; wrong
numbers are left as they are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..problems import Part
from .workloads import mean_loss

Solver = Literal["CG", "Neumann"]
SOLVERS: tuple[Solver, ...] = ("CG", "Neumann")
# The derivative in the penalties of every parameter tensor, in their order.
Slopes = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where training ended, and what is asked of a hypergradient there.

    model: with the trained weights, differentiable ones. penalties: like them, one number per
    weight; the training loss is that of the data plus half the sum of penalty times weight squared.
    products: of a vector with the training loss's Hessian that a solver may make. step_size: of
    Neumann's series.
    """

    model: nn.Module
    penalties: Sequence[Tensor]
    train: Part
    valid: Part
    products: int
    step_size: float

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]


@dataclass(frozen=True)
class ImplicitPeer:
    """One way to an implicit hypergradient that is not this project's.

    prepare(optimum, solver) -> what makes the hypergradient, every time that it is called; what a
    user pays once is done before. package: what must be installed, and install: how.
    """

    name: str
    prepare: Callable[[Optimum, Solver], Callable[[], Slopes]]
    note: str
    package: str = "torch"
    install: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        try:
            version(self.package)
        except PackageNotFoundError:
            how = self.install or f"pip install {self.package}"
            return f"{self.package} is not installed; {how} adds this row"
        return ""

    def __call__(self, optimum: Optimum, solver: Solver) -> Callable[[], Slopes]:
        with _quietly():
            made = self.prepare(optimum, solver)

        def quiet() -> Slopes:
            with _quietly():
                return made()

        return quiet


@contextmanager
def _quietly() -> Iterator[None]:
    """What other libraries warn of is not the user's doing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def training_loss(
    output: Tensor, target: Tensor, weights: Sequence[Tensor], penalties: Sequence[Tensor]
) -> Tensor:
    pairs = zip(weights, penalties, strict=True)
    return mean_loss(output, target) + sum((c * w * w).sum() for w, c in pairs) / 2


def _begun(optimum: Optimum) -> tuple[list[Tensor], Slopes, Slopes]:
    """(penalties to differentiate in, the gradient of the held-out loss in the weights, that of the
    training loss with a graph to both).
    """
    weights, penalties = optimum.weights, _leaves(optimum.penalties)
    (inputs, target), (held_out, held_out_target) = optimum.train, optimum.valid
    b = torch.autograd.grad(mean_loss(optimum.model(held_out), held_out_target), weights)
    loss = training_loss(optimum.model(inputs), target, weights, penalties)
    return penalties, b, torch.autograd.grad(loss, weights, create_graph=True)


def by_hand(optimum: Optimum, solver: Solver) -> Callable[[], Slopes]:
    """The gradient's graph is made once and differentiated for every product."""
    weights = optimum.weights

    def hypergradient() -> Slopes:
        penalties, b, gradient = _begun(optimum)

        def product(v: Slopes) -> Slopes:
            return torch.autograd.grad(gradient, weights, v, retain_graph=True)

        if solver == "CG":
            x = _conjugate_gradient(product, b, optimum.products)
        else:
            x = term = b
            for _ in range(optimum.products):
                term = _axpy(-optimum.step_size, product(term), term)
                x = _axpy(1.0, term, x)
            x = [optimum.step_size * each for each in x]
        return [-each for each in torch.autograd.grad(gradient, penalties, x)]

    return hypergradient


def by_fixed_point(optimum: Optimum, solver: Solver) -> Callable[[], Slopes]:
    """v = J'v + dF/dw for the map of one gradient step, and J_penalties' v (Grazzi et al. 2020,
    arXiv:2006.16218, section 2.3).
    """
    weights = optimum.weights

    def hypergradient() -> Slopes:
        penalties, b, gradient = _begun(optimum)
        stepped = [w - optimum.step_size * g for w, g in zip(weights, gradient, strict=True)]

        def transposed(v: Slopes) -> Slopes:
            return torch.autograd.grad(stepped, weights, v, retain_graph=True)

        if solver == "CG":
            v = _conjugate_gradient(lambda v: _axpy(-1.0, transposed(v), v), b, optimum.products)
        else:
            v = b
            for _ in range(optimum.products):
                v = _axpy(1.0, transposed(v), b)
        return torch.autograd.grad(stepped, penalties, v)

    return hypergradient


def by_torchopt(optimum: Optimum, solver: Solver) -> Callable[[], Slopes]:
    implicit: Any = import_module("torchopt.diff.implicit")
    solvers: Any = import_module("torchopt.linear_solve")
    count = optimum.products
    solve = (
        solvers.solve_cg(maxiter=count, rtol=0.0, atol=0.0)
        if solver == "CG"
        else solvers.solve_inv(ns=True, maxiter=count, alpha=optimum.step_size)
    )

    def output(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        named = dict(zip(optimum.names, weights, strict=True))
        called: Tensor = functional_call(optimum.model, named, (inputs,))
        return called

    def loss(weights: Any, penalties: Any, inputs: Tensor, target: Tensor) -> Tensor:
        return training_loss(output(weights, inputs), target, weights, penalties)

    @implicit.custom_root(torch.func.grad(loss, argnums=0), argnums=1, solve=solve)  # type: ignore[untyped-decorator]  # torchopt has no types
    def trained(weights: Any, penalties: Any, inputs: Tensor, target: Tensor) -> Any:
        return weights

    def hypergradient() -> Slopes:
        penalties = tuple(_leaves(optimum.penalties))
        weights = trained(tuple(optimum.weights), penalties, *optimum.train)
        inputs, target = optimum.valid
        return torch.autograd.grad(mean_loss(output(weights, inputs), target), penalties)

    return hypergradient


def by_betty(optimum: Optimum, solver: Solver) -> Callable[[], Slopes]:
    logging.getLogger("betty").setLevel(logging.WARNING)
    engine, configs = import_module("betty.engine"), import_module("betty.configs")
    logger = import_module("betty.logging.logger_base").get_logger()
    logger.setLevel(logging.WARNING)
    problem: Any = import_module("betty.problems").ImplicitProblem

    class Training(problem):  # type: ignore[misc]  # betty has no types
        def training_step(self, batch: Any) -> Tensor:
            inputs, target = batch
            weights = self.trainable_parameters()
            return training_loss(self.module(inputs), target, weights, list(self.outer.module))

    class HeldOut(problem):  # type: ignore[misc]  # betty has no types
        def training_step(self, batch: Any) -> Tensor:
            inputs, target = batch
            return mean_loss(self.inner(inputs), target)

    config = (
        configs.Config(type="cg", cg_iterations=optimum.products)
        if solver == "CG"
        else configs.Config(
            type="neumann", neumann_iterations=optimum.products, neumann_alpha=optimum.step_size
        )
    )
    penalties = nn.ParameterList(_leaves(optimum.penalties))
    parts = {"module": optimum.model, "train_data_loader": [optimum.train]}
    inner = Training("inner", config, **parts, optimizer=torch.optim.SGD(optimum.weights))
    parts = {"module": penalties, "train_data_loader": [optimum.valid]}
    outer = HeldOut("outer", configs.Config(), **parts, optimizer=torch.optim.SGD(penalties))
    engine.Engine(
        problems=[inner, outer],
        config=configs.EngineConfig(strategy="cpu"),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )

    def hypergradient() -> Slopes:
        # What Engine.run does of a step of the outer problem, without the step.
        inner.cur_batch = inner.get_batch()
        loss, _ = outer.get_loss(outer.get_batch())
        outer.backward(loss, outer.trainable_parameters(), outer.paths)
        found = [c.grad for c in outer.trainable_parameters()]
        outer.zero_grad()
        return found

    return hypergradient


def _conjugate_gradient(product: Callable[[Slopes], Slopes], b: Slopes, steps: int) -> Slopes:
    """Hestenes & Stiefel 1952, on lists of tensors."""
    x: Slopes = [torch.zeros_like(each) for each in b]
    r = p = b
    rr = _dot(r, r)
    for _ in range(steps):
        ap = product(p)
        length = float(rr / _dot(p, ap))
        x, r = _axpy(length, p, x), _axpy(-length, ap, r)
        before, rr = rr, _dot(r, r)
        p = _axpy(float(rr / before), p, r)
    return x


def _axpy(factor: float, x: Slopes, y: Slopes) -> Slopes:
    return [b.add(a, alpha=factor) for a, b in zip(x, y, strict=True)]


def _dot(x: Slopes, y: Slopes) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


IMPLICIT_PEERS: Mapping[str, ImplicitPeer] = {
    peer.name: peer
    for peer in (
        ImplicitPeer(
            "torchopt",
            by_torchopt,
            "custom_root with solve_cg, rtol=0 so that it makes all products and one more for its "
            "start, and with solve_inv(ns=True)",
            "torchopt",
        ),
        ImplicitPeer(
            "betty",
            by_betty,
            "ImplicitProblem with type cg and neumann, its Engine made once and not timed; its CG "
            "goes on from the residual before last, which is not conjugate gradients",
            "betty-ml",
            "pip install --no-deps --ignore-requires-python betty-ml==0.2.1",
        ),
        ImplicitPeer(
            "fixed point",
            by_fixed_point,
            "what users of hypertorch write, from the equations of Grazzi et al. 2020: products "
            "with the Jacobian of one gradient step, by autograd on lists of tensors",
        ),
        ImplicitPeer(
            "by hand",
            by_hand,
            "products with the Hessian, by autograd on lists of tensors; one graph of the gradient "
            "for all of them",
        ),
    )
}

__all__ = [
    "IMPLICIT_PEERS",
    "SOLVERS",
    "ImplicitPeer",
    "Optimum",
    "Slopes",
    "Solver",
    "training_loss",
]
