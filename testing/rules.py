"""What every rule promises, whoever wrote it."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from ..inner.core.flat import flat_step, initial_slots
from ..inner.core.hyper import Choice, Granularity, Tensors
from ..inner.core.layout import Layout
from ..inner.core.rule import Rule
from ..inner.torch_form.optimizer import RuleOptimizer, torch_form
from .contracts import Check, run_checks
from .paths import (
    F64,
    LAYOUT,
    SHAPES,
    SIZE,
    STEPS,
    Values,
    defaults,
    descend,
    free_path,
    free_point,
    grouped,
    loss_of,
    noise,
    parameters,
    path,
    point,
    weights,
)

# Parts of the path's weights that may have no gradient in any step.
DEAD = {"a whole tensor and one element": [*range(6), 7], "everywhere": [*range(SIZE)]}
# Each of these would cut the graph to a hyperparameter, or stop the compiler.
_CUTS = {"math", "float", "item", "detach", "data", "numpy", "tolist", "no_grad"}
# Functions of theirs are derived by hand where they have to be, and are tested by themselves.
_TRUSTED = ("torch", "hyperdescent.inner.numerics", "hyperdescent.inner.compose")
# The rounding of central differences is 1e-10; slopes at the points are above 1e-6.
_slopes_are_right: Callable[..., bool] = partial(
    torch.autograd.gradcheck, eps=1e-5, atol=1e-8, rtol=1e-5, check_undefined_grad=False
)


def check_gradient(rule: Rule, values: Values, granularity: Granularity = "shared") -> None:
    """A path's derivative in every hyper is that of finite differences, in float64."""
    at, names, free = free_point(rule, values, granularity)
    # Where a hyper has many values, a random mean of their slopes.
    assert _slopes_are_right(
        partial(free_path, rule, at, names), free, fast_mode=granularity != "shared"
    )


def check_forward_gradient(rule: Rule, values: Values) -> None:
    """The same in forward mode."""
    at, names, free = free_point(rule, values)
    moved = partial(free_path, rule, at, names)
    with warnings.catch_warnings():
        # torch's own forward mode scripts its decompositions on first use, which is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        assert _slopes_are_right(moved, free, check_forward_ad=True, check_backward_ad=False)


def check_every_hyper_matters(rule: Rule, values: Values) -> None:
    """A path depends on every hyper."""
    at, names, free = free_point(rule, values, rough=True)
    start = free_path(rule, at, names, *free)
    for i, name in enumerate(names):
        far = 3.0 if name in rule.rough() else 0.1
        nudged = [z + far * (i == j) for j, z in enumerate(free)]
        change = free_path(rule, at, names, *nudged) - start
        assert change.abs().max() > 1e-6, f"{rule.name} does not depend on {name}"


def check_dead_weights(rule: Rule, at: Tensors, where: str) -> None:
    """Where weights never get a gradient, a path and its derivatives are finite."""
    alive = torch.ones(SIZE, dtype=F64)
    alive[DEAD[where]] = 0
    leaves = {n: v.clone().requires_grad_() for n, v in at.items()}
    end, _ = path(rule, leaves, alive=alive)
    assert end.isfinite().all(), f"{rule.name}: weights are {end}"
    slopes = torch.autograd.grad(end.sum(), list(leaves.values()), materialize_grads=True)
    for name, slope in zip(leaves, slopes, strict=True):
        assert slope.isfinite(), f"{rule.name}: the slope in {name} is {slope}"


def check_second_derivatives(rule: Rule) -> None:
    """Second derivatives at the defaults are finite, with a tensor that never gets a gradient."""
    leaves = {n: v.requires_grad_() for n, v in defaults(rule).items()}
    alive = torch.ones(SIZE, dtype=F64)
    alive[:6] = 0
    end, _ = path(rule, leaves, alive=alive, steps=3)
    inputs = list(leaves.values())
    slopes = torch.autograd.grad(
        end.square().sum(), inputs, create_graph=True, materialize_grads=True
    )
    curvature = torch.autograd.grad(
        sum(slopes[1:], slopes[0]), inputs, materialize_grads=True, allow_unused=True
    )
    assert torch.stack(curvature).isfinite().all(), dict(zip(leaves, curvature, strict=True))


def check_batch(rule: Rule, values: Values) -> None:
    """A batch of hypers, by vmap, is a loop over them."""
    at, names, free = free_point(rule, values)
    batch = [z.detach() + torch.tensor([0.0, 0.1, -0.2], dtype=F64) for z in free]
    moved = partial(free_path, rule, at, names)
    one_by_one = torch.stack([moved(*row) for row in zip(*batch, strict=True)])
    # The noise along the path is drawn, from its own seed, within the batched function.
    at_once = torch.func.vmap(moved, randomness="same")(*batch)
    # Sums over a batch are made in another order.
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-15)


def check_inputs_untouched(rule: Rule, values: Values) -> None:
    """A step writes into none of its inputs."""
    at = point(rule, values)
    shape = (6,) if rule.over == "model" else (2, 3)
    p, g = noise(0, shape), noise(1, shape)
    s = {n: x + 0.5 if x.ndim else x for n, x in rule.init(p, at).items()}
    t = torch.tensor(2, dtype=F64)
    given = {"p": p, "g": g, "t": t, **s, **at}
    before = {n: x.clone() for n, x in given.items()}
    rule(p, g, s, t, at, loss=torch.tensor(2.0, dtype=F64))
    for name, x in given.items():
        assert torch.equal(x, before[name]), f"{rule.name} writes into {name}"


def check_types_and_shapes(
    rule: Rule, values: Values, dtype: torch.dtype, granularity: Granularity = "shared"
) -> None:
    """Weights and slots keep their type and shape."""
    at = point(rule, values, granularity)
    p, s = path(rule, at, dtype=dtype)
    assert (p.dtype, p.shape) == (dtype, (SIZE,)), f"weights are {p.dtype} {tuple(p.shape)}"
    assert p.isfinite().all(), f"weights are {p}"
    start = initial_slots(rule, LAYOUT, p, at)
    for name, slot in rule.slots.items():
        assert (s[name].dtype, s[name].shape) == (start[name].dtype, start[name].shape), name
        if slot.shared and granularity == "shared":
            assert (s[name].dtype, s[name].shape) == (F64, ()), name
        elif s[name].shape == (SIZE,):
            assert s[name].dtype in (dtype, torch.float32), name


def check_types_by_tensor(rule: Rule, values: Values) -> None:
    """Types are kept where one hyper has a value per tensor and others have not."""
    for name in rule.hypers:
        if rule.hypers[name].finest == "shared":
            continue
        at = point(rule, values) | {name: point(rule, values, "tensor")[name].expand(3)}
        p, s = path(rule, at, dtype=torch.float32)
        assert p.dtype == torch.float32, f"{rule.name} with {name} per tensor: {p.dtype}"
        vectors = {n: x.dtype for n, x in s.items() if x.ndim}
        assert set(vectors.values()) <= {torch.float32}, f"{name} per tensor gives {vectors}"


def check_flat_step(rule: Rule, values: Values, granularity: Granularity = "shared") -> None:
    """A step on all tensors in one vector is the rule on each, if it is not over the model."""
    if rule.over == "model":
        return
    at, names, free = free_point(rule, values, granularity, rough=True)
    at |= {n: rule.hypers[n].value(z.detach()) for n, z in zip(names, free, strict=True)}
    flat, _ = path(rule, at)
    drifts = [LAYOUT.unflatten(noise(step, (SIZE,))) for step in range(STEPS + 1)]
    losses: list[Tensor | None] = [None] * STEPS
    if "loss" in rule.needs:  # Of all tensors, not of each.
        starts = [path(rule, at, steps=step)[0] for step in range(STEPS)]
        losses = [loss_of(p, noise(i + 1, (SIZE,))) for i, p in enumerate(starts)]
    for i, (name, start) in enumerate(LAYOUT.unflatten(noise(0, (SIZE,))).items()):
        unit = LAYOUT.units[i]
        own = {n: _of_tensor(v, i, name, unit) for n, v in at.items()}
        p = start.view(unit.shapes[0])
        s = rule.init(p, own, unit)
        for step in range(1, STEPS + 1):
            g = torch.sin(p) + drifts[step][name].view_as(p)
            t = torch.tensor(step, dtype=F64)
            p, s = rule(p, g, s, t, own, loss=losses[step - 1], layout=unit)
        # A sum over a view may be made in another order.
        torch.testing.assert_close(
            LAYOUT.unflatten(flat)[name].view_as(p), p, rtol=1e-13, atol=1e-14
        )


def _of_tensor(value: Tensor, i: int, name: str, unit: Layout) -> Tensor:
    """A value per element takes the shape of its tensor, one per tensor is a number there."""
    if value.ndim == 0:
        return value
    if value.numel() == SIZE:
        return LAYOUT.unflatten(value)[name].view(unit.shapes[0])
    return value[i]


def check_torch_form(rule: Rule, values: Values, dtype: torch.dtype = F64) -> None:
    """The torch.optim form takes the rule's steps, bit for bit."""
    at = point(rule, values)
    optimizer = torch_form(rule)(parameters(dtype), **grouped(rule, at))
    start = {str(i): p.clone() for i, p in enumerate(weights(optimizer))}
    layout = Layout.of(start)
    p = layout.flatten(start)
    s = initial_slots(rule, layout, p, at)
    for step in range(STEPS):
        drift = layout.flatten(
            {str(i): noise(1000 * step + i, x.shape, dtype) for i, x in enumerate(start.values())}
        )
        parts = zip(p.split(layout.sizes), drift.split(layout.sizes), strict=True)
        first, *losses = (loss_of(*pair) for pair in parts)
        g, t = torch.sin(p) + drift, torch.tensor(step + 1, dtype=F64)
        p, s = flat_step(rule, layout, p, g, s, t, at, loss=sum(losses, first))
    descend([optimizer], STEPS)
    expected = [*layout.unflatten(p).values()]
    torch.testing.assert_close(weights(optimizer), expected, rtol=0, atol=0)


def check_resume(rule: Rule, values: Values, dtype: torch.dtype = torch.float32) -> None:
    """A run resumed from a state_dict in a file is bit-identical."""

    def build() -> RuleOptimizer:
        first, *others = parameters(dtype)
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.03}, {"params": others}]
        return torch_form(rule)(groups, **grouped(rule, point(rule, values)))

    straight, broken, resumed = build(), build(), build()
    descend([straight], 15)
    descend([broken], 7)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for new, old in zip(weights(resumed), weights(broken), strict=True):
        new.copy_(old)
    descend([resumed], 8, start=7)
    assert all(map(torch.equal, weights(resumed), weights(straight))), "other weights"
    assert [group["t"].dtype for group in resumed.param_groups] == [F64, F64]


def check_pickling(rule: Rule) -> None:
    """A pickled rule is the same, with its options and slots."""
    last = {n: c.options[-1] for n, c in rule.choices.items() if isinstance(c, Choice)}
    for each in (rule, rule.choose(**last)):
        assert pickle.loads(pickle.dumps(each)) == each, "it comes back as another rule"
    assert pickle.loads(pickle.dumps(rule.slots)).keys() == rule.slots.keys()


def check_mathematics_only(rule: Rule) -> None:
    """Its functions, and those that they call, use nothing that cuts the graph to a hyper."""
    seen: set[Callable[..., Any]] = set()
    waiting = _written(rule.update)
    while waiting:
        function = waiting.pop()
        # What was typed in at a prompt has no module.
        if function in seen or (function.__module__ or "").startswith(_TRUSTED):
            continue
        seen.add(function)
        used = _names(function.__code__)
        assert not used & _CUTS, (
            f"{function.__module__}.{function.__qualname__} uses {', '.join(sorted(used & _CUTS))}"
        )
        called = (function.__globals__.get(name) for name in used)
        waiting += [each for each in called if isinstance(each, FunctionType)]


def _written(update: Any) -> list[FunctionType]:
    """The functions that an update is made of, those of rules inside it included."""
    inside = [getattr(update, n).update for n in ("one", "other", "inner") if hasattr(update, n)]
    own = update.wrapper.body if hasattr(update, "wrapper") else update
    written = [own] if isinstance(own, FunctionType) else []
    return written + [function for each in inside for function in _written(each)]


def _names(code: CodeType) -> set[str]:
    """Globals and attributes that a function uses, and functions inside it."""
    inside = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names}.union(*inside)


_FIX_GRADIENT = (
    "write the update with torch operations on p, g, slots and hypers, and declare `rough=` for a "
    "hyper whose derivative says nothing"
)
_FIX_TYPES = "make new tensors like p (torch.zeros_like(p), x.to(p.dtype)), and slots by their init"
_FIX_PURE = "compute new tensors instead of writing into those given"


def rule_checks(rule: Rule, values: Mapping[str, float] | None = None) -> Iterator[Check]:
    """The contract of a rule, a check per property.

    Args:
        rule: to be checked.
        values: of hypers at which they matter on a loss of about 20 with gradients of about 1,
            where a common one or the middle of the search range is not.
    """
    at = dict(values or {})
    for granularity in SHAPES:
        yield Check(
            f"its derivatives in hypers per {granularity} are right",
            partial(check_gradient, rule, at, granularity),
            _FIX_GRADIENT,
        )
        yield Check(
            f"one vector is the rule on each tensor, with hypers per {granularity}",
            partial(check_flat_step, rule, at, granularity),
            "say over='tensor' or 'model' of a rule that looks at more than elements",
        )
    yield Check("forward mode is right", partial(check_forward_gradient, rule, at), _FIX_GRADIENT)
    yield Check(
        "every hyper matters",
        partial(check_every_hyper_matters, rule, at),
        "take out the hyper, say when= it means anything, or give values= at which it does",
    )
    for where in DEAD:
        yield Check(
            f"without a gradient for {where} all is finite",
            partial(check_dead_weights, rule, point(rule, at), where),
            "guard roots and quotients where they meet 0: numerics.root, eps inside the root",
        )
    yield Check(
        "second derivatives are finite",
        partial(check_second_derivatives, rule),
        "guard roots and quotients where they meet 0: numerics.root, eps inside the root",
    )
    yield Check("a batch is a loop", partial(check_batch, rule, at), _FIX_PURE)
    yield Check("inputs stay", partial(check_inputs_untouched, rule, at), _FIX_PURE)
    for dtype in (torch.float32, torch.bfloat16):
        yield Check(
            f"types are kept in {dtype}",
            partial(check_types_and_shapes, rule, at, dtype),
            _FIX_TYPES,
        )
    yield Check("types are kept by tensor", partial(check_types_by_tensor, rule, at), _FIX_TYPES)
    yield Check(
        "its torch form takes its steps",
        partial(check_torch_form, rule, at),
        "let slots and weights depend on nothing but what the update is given",
    )
    yield Check(
        "a resumed run is the same",
        partial(check_resume, rule, at),
        "keep all that steps need in slots",
    )
    yield Check(
        "it is mathematics only",
        partial(check_mathematics_only, rule),
        "use torch functions of tensors in the place of Python numbers",
    )


def check_rule(rule: Rule, values: Mapping[str, float] | None = None) -> None:
    """Raise AssertionError unless a rule holds what every rule promises.

    Args:
        rule: one of your own, as `hyperdescent.rule` makes it.
        values: of hypers at which they matter on a loss of about 20 with gradients of about 1,
            where a common one or the middle of the search range is not.
    """
    run_checks(f"the rule {rule.name}", rule_checks(rule, values))


__all__ = ["check_rule", "rule_checks"]
