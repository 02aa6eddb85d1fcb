"""The same metagradient by other libraries, each as its users would write it.

Every peer runs on the workload's own starting weights, batches and held-out data. Where it cannot
do what is asked, it gets the least patch that lets it, which its note names; wrong numbers and NaN
are left as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...meta.problems.module_problem import ModuleProblem
from ...meta.problems.modules import autocast_region
from ...meta.problems.seeding import fork_rng
from .workloads import SEED, Workload, mean_loss

# Under a root, so that a weight that never saw a gradient gives a derivative of 0 and not NaN.
_UNDER_ROOT = 1e-30


class Answer(NamedTuple):
    """loss: held-out, after training. slopes: its derivative by hyper, none where refused. how: the
    steps were done, where there is more than one way.
    """

    loss: float
    slopes: dict[str, float]
    how: str = ""


@dataclass(frozen=True)
class Peer:
    """One way to a metagradient that is not this project's. package: what must be installed."""

    name: str
    differentiate: Callable[[Workload, ModuleProblem], Answer]
    note: str
    package: str = "torch"

    @property
    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if find_spec(self.package):
            return ""
        return f"{self.package} is not installed; pip install {self.package} adds this row"

    def __call__(self, workload: Workload, problem: ModuleProblem) -> Answer:
        # The fused kernels of attention have no second derivative.
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            return self.differentiate(workload, problem)


def train_plainly(
    workload: Workload, problem: ModuleProblem, values: Mapping[str, float] | None = None
) -> nn.Module:
    """The model trained by torch.optim as anyone would: what all times are ratios to."""
    model = started(problem)
    optimizer = make_optimizer(workload.rule, model.parameters(), values or workload.values)
    for i in range(workload.steps):
        inputs, target = problem.batch(i, SEED)
        optimizer.zero_grad(set_to_none=True)
        with autocast_region(workload.device, problem.autocast):
            loss = mean_loss(model(inputs), target)
        loss.backward()
        optimizer.step()
    return model


def held_out_loss(model: Callable[..., Tensor], problem: ModuleProblem) -> Tensor:
    inputs, target = problem.splits["valid"].whole()
    return mean_loss(model(inputs), target)


def started(problem: ModuleProblem) -> nn.Module:
    """A model of its own with the weights that every method starts from."""
    with fork_rng(SEED):
        model = problem.make_model()
    params, buffers = problem.start(SEED)
    model.load_state_dict({**params, **buffers})
    return model


def make_optimizer(
    rule: str, params: Iterable[Tensor], values: Mapping[str, Any], **options: bool
) -> torch.optim.Optimizer:
    """torch's own optimizer. values: numbers or tensors by hyper."""
    if rule == "sgd":
        return torch.optim.SGD(params, **values, **options)
    betas = (values["beta1"], values["beta2"])
    return torch.optim.Adam(params, values["lr"], betas, **options)


def by_higher(workload: Workload, problem: ModuleProblem) -> Answer:
    import higher

    model, hypers = started(problem), _leaves(workload, problem)
    optimizer = make_optimizer(workload.rule, model.parameters(), workload.values)
    override: dict[str, list[Any]] = {name: [value] for name, value in hypers.items()}
    if workload.rule == "adam":
        override = {"lr": [hypers["lr"]], "betas": [(hypers["beta1"], hypers["beta2"])]}
    with higher.innerloop_ctx(model, optimizer, override=override) as (unrolled, differentiable):
        for i in range(workload.steps):
            inputs, target = problem.batch(i, SEED)
            differentiable.step(mean_loss(unrolled(inputs), target))
        return _answer(held_out_loss(unrolled, problem), hypers)


def by_torchopt(workload: Workload, problem: ModuleProblem) -> Answer:
    # Typed for numbers, though made for tensors.
    torchopt: Any = import_module("torchopt")
    model, hypers = started(problem), _leaves(workload, problem)
    if workload.rule == "sgd":
        optimizer = torchopt.MetaSGD(model, **hypers)
    else:
        betas = (workload.values["beta1"], workload.values["beta2"])
        hypers = {"lr": hypers["lr"]}
        optimizer = torchopt.MetaAdam(model, hypers["lr"], betas, eps_root=_UNDER_ROOT)
    for i in range(workload.steps):
        inputs, target = problem.batch(i, SEED)
        optimizer.step(mean_loss(model(inputs), target))
    return _answer(held_out_loss(model, problem), hypers)


def by_torch_optim(workload: Workload, problem: ModuleProblem) -> Answer:
    model, hypers = started(problem), _leaves(workload, problem)
    params = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    # On a GPU it would else take SGD's operations on lists, which refuse a rate that is a tensor.
    options = {"differentiable": True, "foreach": False}
    optimizer = make_optimizer(workload.rule, params.values(), hypers, **options)
    for i in range(workload.steps):
        inputs, target = problem.batch(i, SEED)
        loss = mean_loss(functional_call(model, params, (inputs,)), target)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        # step writes in place, so it gets copies in the place of what the graph still needs.
        copies = [p.clone() for p in params.values()]
        for old, new, grad in zip(params.values(), copies, grads, strict=True):
            new.grad = grad
            slots = optimizer.state.pop(old, {})
            if workload.rule == "sgd":
                slots = {n: None if x is None else x.clone() for n, x in slots.items()}
            optimizer.state[new] = slots
        optimizer.param_groups[0]["params"] = copies
        optimizer.step()
        params = dict(zip(params, copies, strict=True))
    inputs, target = problem.splits["valid"].whole()
    return _answer(mean_loss(functional_call(model, params, (inputs,)), target), hypers)


def by_hand(workload: Workload, problem: ModuleProblem) -> Answer:
    model, hypers = started(problem), _leaves(workload, problem)
    names = [n for n, _ in model.named_parameters()]
    params: Sequence[Tensor] = [p.detach().requires_grad_() for p in model.parameters()]
    update = _sgd if workload.rule == "sgd" else _adam
    slots = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    def output(inputs: object) -> Tensor:
        called: Tensor = functional_call(model, dict(zip(names, params, strict=True)), (inputs,))
        return called

    for i in range(workload.steps):
        inputs, target = problem.batch(i, SEED)
        grads = torch.autograd.grad(mean_loss(output(inputs), target), params, create_graph=True)
        stepped = [
            update(p, g, s, i + 1, **hypers) for p, g, s in zip(params, grads, slots, strict=True)
        ]
        params, slots = [p for p, _ in stepped], [s for _, s in stepped]
    return _answer(held_out_loss(output, problem), hypers)


Slots = tuple[Tensor, Tensor]


def _sgd(
    p: Tensor, g: Tensor, s: Slots, t: int, lr: Tensor, momentum: Tensor
) -> tuple[Tensor, Slots]:
    b = momentum * s[0] + g
    return p - lr * b, (b, s[1])


def _adam(
    p: Tensor, g: Tensor, s: Slots, t: int, lr: Tensor, beta1: Tensor, beta2: Tensor
) -> tuple[Tensor, Slots]:
    m = beta1 * s[0] + (1 - beta1) * g
    v = beta2 * s[1] + (1 - beta2) * g * g
    root = (v / (1 - beta2**t) + _UNDER_ROOT).sqrt()
    return p - lr * (m / (1 - beta1**t)) / (root + 1e-8), (m, v)


def _leaves(workload: Workload, problem: ModuleProblem) -> dict[str, Tensor]:
    """The hypers as tensors to differentiate in, of the weights' dtype and device."""
    like = next(iter(problem.start(SEED)[0].values()))
    return {
        name: torch.tensor(value, dtype=like.dtype, device=like.device, requires_grad=True)
        for name, value in workload.values.items()
    }


def _answer(loss: Tensor, hypers: Mapping[str, Tensor]) -> Answer:
    grads = torch.autograd.grad(loss, list(hypers.values()))
    return Answer(float(loss.detach()), {n: float(g) for n, g in zip(hypers, grads, strict=True)})


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "higher",
            by_higher,
            "hypers through override=, no patch; its Adam's derivative in beta2 is wrong",
            "higher",
        ),
        Peer(
            "torchopt",
            by_torchopt,
            f"MetaSGD, and MetaAdam with eps_root={_UNDER_ROOT:g} (NaN without); MetaAdam refuses "
            "tensors as betas, so it differentiates in lr alone and does less than the others",
            "torchopt",
        ),
        Peer(
            "torch.optim(differentiable=True)",
            by_torch_optim,
            "weights swapped into param_groups and copied at every step, for SGD its momentum "
            "buffers too (an error without); its Adam is NaN where a weight never has a gradient",
        ),
        Peer(
            "unrolled by hand",
            by_hand,
            f"a list of tensors and plain autograd, {_UNDER_ROOT:g} under Adam's root",
        ),
    )
}

__all__ = ["PEERS", "Answer", "Peer", "held_out_loss", "train_plainly"]
