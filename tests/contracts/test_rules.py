"""What every registered rule promises. A new rule earns all of this for one line in the REFERENCE
of a module of tests/oracles.
"""

import ast
import inspect
import io
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from points import (
    F64,
    REFERENCE,
    allowed,
    applies,
    middle,
    reference_point,
    sloped,
    telling,
)

from hyperdescent.inner.core.flat import flat_readout, flat_step, initial_slots
from hyperdescent.inner.core.hyper import Choice
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form
from hyperdescent.inner.torch_form.param_groups import betas_of

# Every wrapper once: they promise what rules do, and so do rules in rules.
COMPOSED = [
    "cautious(adam)",
    "cautious_weight_decay(adamw)",
    "centralize_gradient(adam)",
    "clip_norm(sgd)",
    "clip_tensor(adam)",
    "clip_value(sgd)",
    "coupled_weight_decay(adam)",
    "decoupled_weight_decay(sgd)",
    "ema(adam)",
    "induced_metric(adam)",
    "lookahead(adam)",
    "partition(alphagrad, nadam)",
    "random_scaling(adam)",
    "xgrad(sgd)",
    # Wrappers in wrappers, and each of the kinds of unit in each.
    "cautious(clip_norm(adam))",
    "decoupled_weight_decay(clip_norm(partition(sgd, adam)))",
    "ema(xgrad(adam))",
]


# Large enough that a wrong slope in any of them shows in the path; others take the middle of
# their search range.
POINT = {
    "lr": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 0.05,
    "weight_decay": 0.1,
    "momentum": 0.7,
    "dampening": 0.3,
    "alpha": 0.9,
}
SMALL = {"matrix": torch.zeros(3, 2), "vector": torch.zeros(2), "scalar": torch.zeros(())}
LAYOUT = Layout.of(SMALL)
SIZE = sum(LAYOUT.sizes)
GRANULARITY = {"shared": (), "tensor": (3,), "element": (SIZE,)}
STEPS = 8  # RAdam's adaptive step begins at the sixth for beta2 = 0.9.


# Combinations of a rule's options from which on each option is changed by itself.
MANY = 5


def combinations(options, defaults):
    """Values of all options: every combination of a few, or each with the others' defaults."""
    if math.prod(map(len, options.values())) < MANY:
        return [
            dict(zip(options, each, strict=True)) for each in itertools.product(*options.values())
        ]
    alone = [{n: v} for n, values in options.items() for v in values if v != defaults[n]]
    return [defaults | each for each in ({}, *alone)]


def variants(rules):
    """Every rule under its options, but for those that its reference fixes; of rules in rules under
    the defaults, because their options are those of others.
    """
    for rule in rules:
        fixed = REFERENCE[rule.name].chosen if rule.name in REFERENCE else {}
        free = {n: c for n, c in rule.choices.items() if isinstance(c, Choice) and n not in fixed}
        options = {} if rule.name in COMPOSED else {n: c.options for n, c in free.items()}
        for named in combinations(options, {n: rule.options()[n] for n in options}):
            label = "-".join([rule.name, *(f"{n}={v}" for n, v in named.items())])
            yield pytest.param(rule.choose(**named, **fixed), id=label)


ALL = [*RULES.values(), *map(find_rule, COMPOSED)]
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
each_variant = pytest.mark.parametrize("rule", list(variants(ALL)))
registered = pytest.mark.parametrize("rule", list(variants(RULES.values())))


def thorough(rule):
    """Whether a variant gets what is dear: all but options of rules that act on whole tensors."""
    return rule.over == "element" or all(
        value == rule.choices[n].default
        for n, value in rule.options().items()
        if isinstance(rule.choices[n], Choice)
    )


each_of_elements = pytest.mark.parametrize(
    "rule", [each for each in variants(ALL) if each.values[0].over == "element"]
)
each_thorough = pytest.mark.parametrize(
    "rule", [each for each in variants(ALL) if thorough(each.values[0])]
)
each_in_grains = pytest.mark.parametrize(
    ("rule", "granularity"),
    [
        pytest.param(each.values[0], granularity, id=f"{each.id}-{granularity}")
        for each in variants(ALL)
        for granularity in (GRANULARITY if thorough(each.values[0]) else ["shared"])
    ],
)


def point(rule, granularity="shared", **changed):
    """A value of every hyperparameter where each of them matters."""
    numbers = telling(rule, POINT | reference_point(rule)) | changed
    return defaults(rule) | {
        name: torch.full(GRANULARITY[allowed(rule.hypers[name], granularity)], number, dtype=F64)
        for name, number in numbers.items()
        if name in rule.hypers
    }


def defaults(rule):
    return {name: torch.tensor(h.default, dtype=F64) for name, h in rule.hypers.items()}


def noise(seed, shape, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def loss_of(p, drift):
    """Positive, with the gradient sin(p) + drift."""
    return (1 - torch.cos(p)).sum() + (drift * p).sum() + 20


def path(rule, values, *, alive=1.0, dtype=F64, steps=STEPS):
    """The flat weights and slots after some steps along a gradient that depends on the weights."""
    p = noise(0, (SIZE,), dtype)
    s = initial_slots(rule, LAYOUT, p, values)
    for step in range(1, steps + 1):
        drift = noise(step, (SIZE,), dtype)
        g, loss = alive * (torch.sin(p) + drift), loss_of(p, drift)
        t = torch.tensor(step, dtype=F64)
        p, s = flat_step(rule, LAYOUT, p, g, s, t, values, loss=loss)
    return p, s


def free_path(rule, fixed, names, *free):
    """Where a path ends, the weights trained and those to use, from unconstrained coordinates."""
    moved = {n: rule.hypers[n].value(z) for n, z in zip(names, free, strict=True)}
    p, s = path(rule, fixed | moved)
    if rule.readout:
        return torch.cat([p, flat_readout(rule, LAYOUT, p, s, fixed | moved)])
    return p


def free_point(rule, granularity="shared", *, rough=False):
    """The values of a point, and of those that have a derivative (rough: of all) the names and the
    unconstrained coordinates.
    """
    values = point(rule, granularity)
    names = [n for n, h in rule.hypers.items() if applies(rule, h)] if rough else sloped(rule)
    free = []
    for n in names:
        spread = 1 + 0.1 * noise(99, GRANULARITY[allowed(rule.hypers[n], granularity)])
        free.append((rule.hypers[n].free(values[n]) * spread).requires_grad_())
    return values, names, free


def parameters(dtype=F64):
    shapes = [(3, 4), (5,), (), (2, 3, 2, 2)]
    return [torch.nn.Parameter(noise(i, shape, dtype)) for i, shape in enumerate(shapes)]


def descend(optimizers, steps, start=0):
    """Steps of optimizers side by side, each along its own weights."""
    for step in range(start, start + steps):
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            losses = []
            for i, p in enumerate(params):
                drift = noise(1000 * step + i, p.shape, p.dtype)
                p.grad = torch.sin(p.detach()) + drift
                losses.append(loss_of(p.detach(), drift))
            if takes_loss(optimizer):
                optimizer.step(loss=sum(losses))
            else:
                optimizer.step()


def takes_loss(optimizer):
    return "loss" in inspect.signature(optimizer.step).parameters


def weights(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def grouped(rule, values):
    """Hyperparameters as torch.optim takes them."""
    given = {n: float(v) for n, v in values.items()}
    if betas := betas_of(rule):
        given["betas"] = tuple(given.pop(name) for name in betas)
    return given


@pytest.fixture
def default_float64():
    # torch.optim.NAdam keeps its running product in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


def assert_close(ours, theirs, nudged, known):
    """The same path, up to what rounding may come to: 64 times what one unit in the last place of
    the start does, whatever the processor rounds in another way on the path itself.
    """
    pairs = zip(weights(ours), weights(nudged), strict=True)
    rounding = max(float(((x - y).abs() / (1 + x.abs())).max()) for x, y in pairs)
    bound = max(known.tolerance, 64 * rounding)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=bound, atol=bound)


def nudged_parameters():
    """Weights a unit in the last place from the others."""
    params = parameters()
    for i, p in enumerate(params):
        p.data *= 1 + 2**-52 * noise(i, p.shape).sign()
    return params


class TestReference:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @registered
    def test_same_path_with_changing_hyperparameters(self, rule, seed, default_float64):
        def draw(moment):
            shares = torch.rand(len(rule.hypers), generator=torch.Generator().manual_seed(moment))
            drawn = zip(rule.hypers.items(), shares.tolist(), strict=True)
            middles = {n: torch.tensor(middle(h, 0.25 + x / 2)) for (n, h), x in drawn}
            return grouped(
                rule, defaults(rule) | {n: middles[n] for n in point(rule) if n in moving}
            )

        known = REFERENCE[rule.name]
        moving = {n for n, h in rule.hypers.items() if applies(rule, h)}
        ours, nudged = (
            torch_form(rule)(params, **draw(seed), **rule.options())
            for params in (parameters(), nudged_parameters())
        )
        theirs = known.make(parameters(), **known.translate(draw(seed) | rule.options()))
        for block in range(10):
            for optimizers in ([ours, theirs], [nudged]):
                descend(optimizers, 5, start=5 * block)
            given = draw(100 * block + seed)
            for optimizer in (ours, nudged):
                optimizer.param_groups[0].update(given)
            theirs.param_groups[0].update(known.translate(given | rule.options()))
        assert_close(ours, theirs, nudged, known)

    @each_rule
    def test_same_path_at_the_defaults(self, rule, default_float64):
        known = REFERENCE[rule.name]
        given = {} if known.own_defaults else grouped(rule, defaults(rule)) | rule.options()
        ours, nudged = map(torch_form(rule), (parameters(), nudged_parameters()))
        theirs = known.make(parameters(), **known.translate(given))
        descend([ours, theirs], 50)
        descend([nudged], 50)
        assert_close(ours, theirs, nudged, known)

    @each_rule
    def test_maximize_is_the_mirror_image(self, rule):
        ours, mirror = (torch_form(rule)(parameters(), maximize=flag) for flag in (False, True))
        for step in range(20):
            for optimizer, sign in ((ours, 1), (mirror, -1)):
                for i, p in enumerate(weights(optimizer)):
                    optimizer.param_groups[0]["params"][i].grad = sign * noise(step + i, p.shape)
                optimizer.step(loss=sign * 20)
        assert all(map(torch.equal, weights(ours), weights(mirror)))


# The rounding of central differences is 1e-10; slopes at the points are above 1e-6.
slopes_are_right = partial(
    torch.autograd.gradcheck, eps=1e-5, atol=1e-8, rtol=1e-5, check_undefined_grad=False
)


class TestGradient:
    @each_in_grains
    def test_is_right_in_every_hyperparameter(self, rule, granularity):
        values, names, free = free_point(rule, granularity)
        moved = partial(free_path, rule, values, names)
        # Where a hyper has many values, a random mean of their slopes.
        assert slopes_are_right(moved, free, fast_mode=granularity != "shared")

    # torch's own forward mode scripts its decompositions on first use.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    @each_thorough
    def test_is_right_in_forward_mode(self, rule):
        values, names, free = free_point(rule)
        moved = partial(free_path, rule, values, names)
        assert slopes_are_right(moved, free, check_forward_ad=True, check_backward_ad=False)

    @each_variant
    def test_every_hyperparameter_moves_the_path(self, rule):
        values, names, free = free_point(rule, rough=True)
        start = free_path(rule, values, names, *free)
        for i, name in enumerate(names):
            far = 3.0 if name in rule.rough() else 0.1
            nudged = [z + far * (i == j) for j, z in enumerate(free)]
            change = free_path(rule, values, names, *nudged) - start
            assert change.abs().max() > 1e-6, f"{rule.name} does not depend on {name}"

    @pytest.mark.parametrize("where", ["a whole tensor", "one element", "everywhere"])
    @pytest.mark.parametrize("start", ["defaults", "point"])
    @each_variant
    def test_is_finite_where_weights_never_get_a_gradient(self, rule, start, where):
        alive = torch.ones(SIZE, dtype=F64)
        dead = {"a whole tensor": (0, 6), "one element": (7, 8), "everywhere": (0, SIZE)}
        alive[slice(*dead[where])] = 0
        values = defaults(rule) if start == "defaults" else point(rule, weight_decay=0.0)
        values = {n: v.requires_grad_() for n, v in values.items()}
        end, _ = path(rule, values, alive=alive)
        assert end.isfinite().all()
        for name, slope in zip(
            values,
            torch.autograd.grad(end.sum(), values.values(), materialize_grads=True),
            strict=True,
        ):
            assert slope.isfinite(), f"{rule.name}: the slope in {name} is {slope}"

    @each_variant
    def test_second_derivatives_are_finite_too(self, rule):
        values = {n: v.requires_grad_() for n, v in defaults(rule).items()}
        alive = torch.ones(SIZE, dtype=F64)
        alive[:6] = 0
        end, _ = path(rule, values, alive=alive, steps=3)
        slopes = torch.autograd.grad(
            end.square().sum(), values.values(), create_graph=True, materialize_grads=True
        )
        curvature = torch.autograd.grad(
            sum(slopes), values.values(), materialize_grads=True, allow_unused=True
        )
        assert torch.stack(curvature).isfinite().all(), dict(zip(values, curvature, strict=True))

    @each_variant
    def test_a_batch_of_hyperparameters_is_a_loop_over_them(self, rule):
        values, names, free = free_point(rule)
        batch = [z.detach() + torch.tensor([0.0, 0.1, -0.2], dtype=F64) for z in free]
        moved = partial(free_path, rule, values, names)
        one_by_one = torch.stack([moved(*row) for row in zip(*batch, strict=True)])
        # The noise along the path is drawn, from its own seed, within the batched function.
        at_once = torch.func.vmap(moved, randomness="same")(*batch)
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=1e-15)


class TestForm:
    @each_variant
    def test_inputs_are_untouched(self, rule):
        values = point(rule)
        shape = (6,) if rule.over == "model" else (2, 3)
        p, g = noise(0, shape), noise(1, shape)
        s = {n: x + 0.5 if x.ndim else x for n, x in rule.init(p, values).items()}
        t = torch.tensor(2, dtype=F64)
        given = {"p": p, "g": g, "t": t, **s, **values}
        before = {n: (x.clone(), x._version) for n, x in given.items()}
        rule(p, g, s, t, values, loss=torch.tensor(2.0, dtype=F64))
        for name, x in given.items():
            assert torch.equal(x, before[name][0]), name
            assert x._version == before[name][1], name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @each_in_grains
    def test_dtype_and_shape_are_kept(self, rule, dtype, granularity):
        p, s = path(rule, point(rule, granularity), dtype=dtype)
        assert (p.dtype, p.shape) == (dtype, (SIZE,))
        assert p.isfinite().all()
        start = initial_slots(rule, LAYOUT, p, point(rule, granularity))
        for name, slot in rule.slots.items():
            assert (s[name].dtype, s[name].shape) == (start[name].dtype, start[name].shape), name
            if slot.shared and granularity == "shared":
                assert (s[name].dtype, s[name].shape) == (F64, ())
            elif s[name].shape == (SIZE,):
                assert s[name].dtype in (dtype, torch.float32), name

    @each_variant
    def test_dtype_is_kept_where_one_hyperparameter_has_a_grain_of_its_own(self, rule):
        for name in rule.hypers:
            if rule.hypers[name].finest == "shared":
                continue
            values = point(rule) | {name: point(rule, "tensor")[name].expand(3)}
            p, s = path(rule, values, dtype=torch.float32)
            assert p.dtype == torch.float32, f"{rule.name} with {name} per tensor"
            vectors = {n: x.dtype for n, x in s.items() if x.ndim}
            assert set(vectors.values()) <= {torch.float32}, f"{name} per tensor gives {vectors}"

    @each_in_grains
    def test_flat_step_is_the_rule_on_each_tensor(self, rule, granularity):
        if rule.over == "model":
            pytest.skip("its unit is the flat vector")
        values, names, free = free_point(rule, granularity, rough=True)
        values |= {n: rule.hypers[n].value(z.detach()) for n, z in zip(names, free, strict=True)}
        flat, _ = path(rule, values)
        drifts = [LAYOUT.unflatten(noise(step, (SIZE,))) for step in range(STEPS + 1)]
        losses = [None] * STEPS
        if "loss" in rule.needs:  # Of all tensors, not of each.
            starts = [path(rule, values, steps=step)[0] for step in range(STEPS)]
            losses = [loss_of(p, noise(i + 1, (SIZE,))) for i, p in enumerate(starts)]
        # A value per element takes the shape of its tensor, one per tensor is a number there.
        for i, (name, start) in enumerate(LAYOUT.unflatten(noise(0, (SIZE,))).items()):
            own = {
                n: v
                if v.ndim == 0
                else LAYOUT.unflatten(v)[name].view(LAYOUT.units[i].shapes[0])
                if v.numel() == SIZE
                else v[i]
                for n, v in values.items()
            }
            p = start.view(LAYOUT.units[i].shapes[0])
            s = rule.init(p, own, LAYOUT.units[i])
            for step in range(1, STEPS + 1):
                g = torch.sin(p) + drifts[step][name].view_as(p)
                t = torch.tensor(step, dtype=F64)
                p, s = rule(p, g, s, t, own, loss=losses[step - 1], layout=LAYOUT.units[i])
            torch.testing.assert_close(
                LAYOUT.unflatten(flat)[name].view_as(p), p, rtol=1e-13, atol=1e-14
            )

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
    @each_variant
    def test_torch_form_is_the_rule(self, rule, dtype):
        values = point(rule)
        optimizer = torch_form(rule)(parameters(dtype), **grouped(rule, values))
        start = {str(i): p.clone() for i, p in enumerate(weights(optimizer))}
        layout = Layout.of(start)
        p = layout.flatten(start)
        s = initial_slots(rule, layout, p, values)
        for step in range(STEPS):
            drift = layout.flatten(
                {
                    str(i): noise(1000 * step + i, x.shape, dtype)
                    for i, x in enumerate(start.values())
                }
            )
            loss = sum(
                loss_of(*pair)
                for pair in zip(p.split(layout.sizes), drift.split(layout.sizes), strict=True)
            )
            g, t = torch.sin(p) + drift, torch.tensor(step + 1, dtype=F64)
            p, s = flat_step(rule, layout, p, g, s, t, values, loss=loss)
        descend([optimizer], STEPS)
        expected = [*layout.unflatten(p).values()]
        torch.testing.assert_close(weights(optimizer), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @each_variant
    def test_a_resumed_run_is_bit_identical(self, rule, dtype):
        def build():
            first, *others = parameters(dtype)
            groups = [{"params": [first], "lr": 0.03}, {"params": others}]
            return torch_form(rule)(groups, **grouped(rule, point(rule)))

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
        assert all(map(torch.equal, weights(resumed), weights(straight)))
        assert [group["t"].dtype for group in resumed.param_groups] == [F64, F64]

    @each_variant
    def test_bfloat16_weights_train(self, rule):
        p = torch.nn.Parameter(noise(0, (8,), torch.bfloat16))
        nesterov = "momentum" in rule.hypers and rule.options().get("nesterov")
        extra = {"momentum": 0.5} if nesterov else {}
        # A rate of 1 says that a rule finds its own: a tenth of it would be another rule.
        lrs = {n: h.default for n, h in rule.hypers.items() if n.endswith("lr")}
        extra |= {name: max(0.1, default) for name, default in lrs.items()}
        optimizer = torch_form(rule)([p], **extra)
        before = p.detach().square().sum()
        for _ in range(400):
            p.grad = p.detach().clone()
            optimizer.step(loss=p.detach().square().sum() / 2)
        optimizer.eval()
        assert p.detach().square().sum() < before / 4
        assert optimizer.param_groups[0]["t"] == 400


def test_hypers_without_a_useful_derivative_are_counted():
    rough = {name: set(rule.rough()) for name, rule in RULES.items()}
    assert rough == {name: set(known.rough) for name, known in REFERENCE.items()}


def modules(update):
    """Where an update is written, and those of the rules that it is made of."""
    inside = [getattr(update, n).update for n in ("one", "other", "inner") if hasattr(update, n)]
    written = [update, *([update.wrapper.body] if hasattr(update, "wrapper") else [])]
    return [inspect.getmodule(each) for each in written] + [m for x in inside for m in modules(x)]


class TestFile:
    @each_rule
    def test_is_pickled_with_its_options_and_slots(self, rule):
        last = {n: c.options[-1] for n, c in rule.choices.items() if isinstance(c, Choice)}
        for each in (rule, rule.choose(**last)):
            assert pickle.loads(pickle.dumps(each)) == each
        assert pickle.loads(pickle.dumps(rule.slots)).keys() == rule.slots.keys()

    @each_rule
    def test_is_mathematics_only(self, rule):
        trees = [ast.parse(inspect.getsource(module)) for module in modules(rule.update)]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        banned = {"math", "float", "item", "detach", "data", "numpy", "tolist", "no_grad"}
        used = {n.id for n in nodes if isinstance(n, ast.Name)}
        used |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        assert not used & banned, "these cut the graph"

    @each_rule
    def test_cites_its_source(self, rule):
        assert any(str(year) in rule.doc for year in range(1950, 2030)) or "arXiv:" in rule.doc

    @each_rule
    def test_is_registered_under_the_class_name_in_lower_case(self, rule):
        assert rule.name == rule.title.lower()
