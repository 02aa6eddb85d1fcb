"""Every wrapper around sgd and adam, beside torch's and others' optimizers and plain loops."""

import ast
import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from hyperdescent.inner.compose.wrapper import Wrapper, wrapper
from hyperdescent.inner.core.flat import flat_readout, flat_step, initial_slots
from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.core.rule import Rule
from hyperdescent.inner.registry import RULES, WRAPPERS, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
STEPS = 50
SHAPES = [(3, 4), (5,), (), (2, 3, 2, 2)]
GIVEN = {
    "sgd": {"lr": 0.1, "momentum": 0.7},
    "adam": {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3},
}
TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
each_base = pytest.mark.parametrize("base", GIVEN)
ALL = {n: w for n, w in WRAPPERS.items() if isinstance(w, Wrapper)}
each_wrapper = pytest.mark.parametrize("name", ALL)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters():
    return [torch.nn.Parameter(noise(i, shape)) for i, shape in enumerate(SHAPES)]


def gradient(p, step, i):
    return torch.sin(p) + noise(1000 * step + i, p.shape)


def nothing(*args):
    pass


def descend(optimizer, *, before=nothing, after=nothing, steps=STEPS):
    """before(params): changes gradients; after(params, starts, grads, step): changes weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = gradient(p.detach(), step, i)
        grads = [p.grad.clone() for p in params]
        starts = [p.detach().clone() for p in params]
        before(params)
        optimizer.step()
        with torch.no_grad():
            after(params, starts, grads, step)
    return [p.detach() for p in params]


def ours(name, base, **given):
    return torch_form(find_rule(name.format(base)))(parameters(), **GIVEN[base] | given)


def theirs(base, make=None, **given):
    return (make or TORCH[base])(parameters(), **GIVEN[base] | given)


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def assert_agree(optimizer, other, **changes):
    assert_equal(descend(optimizer), descend(other, **changes))


class TestGradient:
    @each_base
    def test_clip_norm_is_torchs(self, base):
        changed = {"before": lambda params: clip_grad_norm_(params, 1.5)}
        assert_agree(ours("clip_norm({})", base, max_norm=1.5), theirs(base), **changed)

    @each_base
    def test_clip_tensor_is_torchs_tensor_by_tensor(self, base):
        changed = {"before": lambda params: [clip_grad_norm_([p], 0.8) for p in params]}
        assert_agree(ours("clip_tensor({})", base, max_norm=0.8), theirs(base), **changed)

    @each_base
    def test_clip_value_is_torchs(self, base):
        changed = {"before": lambda params: clip_grad_value_(params, 0.7)}
        assert_agree(ours("clip_value({})", base, max_value=0.7), theirs(base), **changed)

    @each_base
    def test_centralize_gradient_is_pytorch_optimizers(self, base):
        changed = {"before": lambda params: [centralize_gradient(p.grad) for p in params]}
        assert_agree(ours("centralize_gradient({})", base), theirs(base), **changed)

    def test_centralized_gradients_have_mean_zero_for_every_output(self):
        optimizer = torch_form(find_rule("centralize_gradient(sgd)"))(parameters(), lr=1.0)
        start = [p.detach() for p in parameters()]
        matrix, vector, _, kernel = (
            p - q for p, q in zip(start, descend(optimizer, steps=1), strict=True)
        )
        assert_equal(matrix.sum(1), torch.zeros(3, dtype=F64))
        assert_equal(kernel.sum((1, 2, 3)), torch.zeros(2, dtype=F64))
        assert_equal(vector, gradient(start[1], 1, 1))

    def test_the_outermost_wrapper_changes_the_gradient_first(self):
        given = {"max_norm": 1.0, "weight_decay": 0.5}

        def decay(params):
            for p in params:
                p.grad += 0.5 * p.detach()

        def clip_then_decay(params):
            clip_grad_norm_(params, 1.0)
            decay(params)

        def decay_then_clip(params):
            decay(params)
            clip_grad_norm_(params, 1.0)

        one = ours("clip_norm(coupled_weight_decay({}))", "adam", **given)
        assert_agree(one, theirs("adam"), before=clip_then_decay)
        other = ours("coupled_weight_decay(clip_norm({}))", "adam", **given)
        assert_agree(other, theirs("adam"), before=decay_then_clip)

    def test_long_gradients_of_bfloat16_have_a_length(self):
        # 2**16 squares, summed in bfloat16, would stand still at 256.
        g = torch.ones(2**16, dtype=torch.bfloat16)
        rule = find_rule("clip_norm(sgd)")
        values = rule.values({"lr": 1.0})
        p, _ = rule(0 * g, g, rule.init(g, values), torch.ones((), dtype=F64), values)
        torch.testing.assert_close(p, -g / 256, rtol=1e-2, atol=0)


class TestDecay:
    @each_base
    def test_coupled_is_torchs(self, base):
        optimizer = ours("coupled_weight_decay({})", base, weight_decay=0.1)
        assert_agree(optimizer, theirs(base, weight_decay=0.1))

    def test_decoupled_around_adam_is_adamw(self):
        optimizer = ours("decoupled_weight_decay({})", "adam", weight_decay=0.1)
        assert_agree(optimizer, theirs("adam", torch.optim.AdamW, weight_decay=0.1))

    def test_decoupled_around_sgd(self):
        def shrink(params, starts, grads, step):
            for p, start in zip(params, starts, strict=True):
                p -= 0.1 * 0.3 * start

        optimizer = ours("decoupled_weight_decay({})", "sgd", weight_decay=0.3)
        assert_agree(optimizer, theirs("sgd"), after=shrink)

    @each_base
    def test_cautious_shrinks_only_where_the_step_does(self, base):
        def shrink(params, starts, grads, step):
            for p, start in zip(params, starts, strict=True):
                u = (start - p).numpy()
                decayed = np.where(u * start.numpy() >= 0, start.numpy(), 0)
                p -= GIVEN[base]["lr"] * 0.3 * torch.as_tensor(decayed)

        optimizer = ours("cautious_weight_decay({})", base, weight_decay=0.3)
        assert_agree(optimizer, theirs(base), after=shrink)

    def test_cautious_shrinks_what_does_not_move(self):
        rule = find_rule("cautious_weight_decay(sgd)")
        values = rule.values({"lr": 0.1, "weight_decay": 0.5})
        p, g = noise(0, 3), torch.zeros(3, dtype=F64)
        moved, _ = rule(p, g, rule.init(p, values), torch.ones((), dtype=F64), values)
        assert_equal(moved, 0.95 * p)

    @pytest.mark.parametrize("kind", ["coupled", "decoupled", "cautious"])
    def test_takes_the_place_of_the_rules_own(self, kind):
        name = f"{kind}_weight_decay"
        rule = find_rule(f"{name}(partition(adamw, sgd))")
        decays = [n for n in rule.hypers if "weight_decay" in n]
        assert decays == ["weight_decay"]
        optimizers = [
            torch_form(find_rule(f"{name}({base})"))(parameters(), lr=0.1, weight_decay=0.2)
            for base in ("adam", "adamw")
        ]
        assert_agree(*optimizers)

    def test_decoupled_is_per_unit_of_each_parts_learning_rate(self):
        given = {"lr": 0.3, "rest_lr": 0.02, "weight_decay": 0.5}

        def shrink(params, starts, grads, step):
            for p, start in zip(params, starts, strict=True):
                p -= (0.3 if p.ndim > 1 else 0.02) * 0.5 * start

        without = torch_form(find_rule("partition(sgd, adam)"))
        for name in ("partition(sgd, adam)", "clip_norm(partition(sgd, adam), max_norm=1e9)"):
            optimizer = torch_form(find_rule(f"decoupled_weight_decay({name})"))
            assert_agree(
                optimizer(parameters(), **given),
                without(parameters(), lr=0.3, rest_lr=0.02),
                after=shrink,
            )

    def test_rate_is_one_where_a_rule_has_none(self):
        still = Rule("still", "Still", {}, {}, {}, lambda p, g, s, t: (p, s))
        rule = WRAPPERS["decoupled_weight_decay"](still, weight_decay=0.25)
        p = noise(0, 3)
        moved, _ = rule(p, p, {}, torch.ones((), dtype=F64), rule.values())
        assert_equal(moved, 0.75 * p)

    def test_two_of_them_are_refused(self):
        with pytest.raises(ValueError, match="would switch coupled_weight_decay off in clip_value"):
            find_rule("cautious_weight_decay(clip_value(coupled_weight_decay(sgd)))")


def masked(starts, params, grads):
    for p, start, g in zip(params, starts, grads, strict=True):
        u = (start - p).numpy()
        agrees = (u * g.numpy()) > 0
        p.copy_(start - torch.as_tensor(u * agrees / max(agrees.mean(), 1e-3)))


class TestStep:
    @each_base
    def test_cautious_in_a_loop(self, base):
        def mask(params, starts, grads, step):
            masked(starts, params, grads)

        assert_agree(ours("cautious({})", base), theirs(base), after=mask)

    def test_cautious_adamw_of_the_paper_decays_beside_the_mask(self):
        def mask(params, starts, grads, step):
            masked(starts, params, grads)
            for p, start in zip(params, starts, strict=True):
                p -= 0.05 * 0.1 * start

        name = "decoupled_weight_decay(cautious({}))"
        assert_agree(ours(name, "adam", weight_decay=0.1), theirs("adam"), after=mask)

    def test_cautious_leaves_steps_alone_that_agree(self):
        # A number is all of its tensor: numel / (agreeing + 1) would halve its steps.
        for shape in ((), (1,), (2, 3)):
            one, other = ([torch.nn.Parameter(noise(0, shape))] for _ in range(2))
            optimizers = torch_form(find_rule("cautious(sgd)"))(one), torch.optim.SGD(other)
            assert_agree(*optimizers)

    def test_cautious_is_of_tensors_around_a_rule_of_the_whole_model_too(self):
        given = {"max_norm": 1.0}
        outside, inside = (
            ours(name, "adam", **given)
            for name in ("cautious(clip_norm({}))", "clip_norm(cautious({}))")
        )
        assert_agree(outside, inside)

    def test_induced_metric_is_the_natural_step_of_plain_descent(self):
        def shorter(params, starts, grads, step):
            square = sum((g.numpy() ** 2).sum() for g in grads)
            for p, start, g in zip(params, starts, grads, strict=True):
                p.copy_(start - 0.1 * g / (1 + 0.3 * square))

        optimizer = ours("induced_metric({})", "sgd", momentum=0.0, xi=0.3)
        assert_agree(optimizer, theirs("sgd"), after=shorter)

    def test_induced_metric_solves_with_the_metric(self):
        g, xi, lr = noise(0, 4), 0.7, 0.2
        rule = find_rule("induced_metric(sgd)")
        values = rule.values({"lr": lr, "xi": xi})
        p, _ = rule(0 * g, g, rule.init(g, values), torch.ones((), dtype=F64), values)
        metric = torch.eye(4, dtype=F64) + xi * torch.outer(g, g)
        assert_equal(p, -lr * torch.linalg.solve(metric, g))

    @each_base
    def test_induced_metric_in_a_loop(self, base):
        lr = GIVEN[base]["lr"]

        def shorter(params, starts, grads, step):
            steps = [p - start for p, start in zip(params, starts, strict=True)]
            product = sum(
                (g.numpy() * u.numpy()).sum() / lr for g, u in zip(grads, steps, strict=True)
            )
            for p, start, u in zip(params, starts, steps, strict=True):
                p.copy_(start + u / (1 + 0.3 * abs(product)))

        assert_agree(ours("induced_metric({})", base, xi=0.3), theirs(base), after=shorter)

    @each_base
    def test_random_scaling_is_one_number_for_all_weights(self, base):
        scales = []

        def scale(params, starts, grads, step):
            for p, start in zip(params, starts, strict=True):
                p.copy_(start + scales[step - 1] * (p - start))

        optimizer = torch_form(find_rule("random_scaling(sgd)"))([torch.nn.Parameter(noise(0, ()))])
        descend(
            optimizer, after=lambda p, q, g, t: scales.append(float((q[0] - p[0]) / 1e-3 / g[0]))
        )
        plain, scaled = theirs(base), ours("random_scaling({})", base)
        one, other = descend(scaled), descend(plain, after=scale)
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-9
        )  # Scales were read off weights.

    def test_random_scaling_draws_exponentially_and_by_seed(self):
        rule = find_rule("random_scaling(sgd)")
        values = rule.values({"lr": 1.0})
        p, g = torch.zeros(1, dtype=F64), -torch.ones(1, dtype=F64)

        def draws(seed):
            chosen = rule.choose(seed=seed)

            def step(t):
                return chosen(p, g, rule.init(p, values), t, values)[0]

            return torch.func.vmap(step)(torch.arange(1, 4001, dtype=F64)).flatten()

        scale, other = draws(0), draws(1)
        assert scale.min() > 0
        # Mean, variance and median of Exp(1), within four standard errors of 4000 draws.
        assert abs(scale.mean() - 1) < 4 / 4000**0.5
        assert abs(scale.var() - 1) < 4 * (8 / 4000) ** 0.5
        assert abs(scale.median() - 0.6931) < 4 / 4000**0.5
        assert abs(torch.corrcoef(torch.stack([scale, other]))[0, 1]) < 4 / 4000**0.5
        # What it is for: E f(x + s d) - f(x) = E f'(x + s d) d, here of f(x) = x**2 at x = -1.
        gained, slopes = (scale - 1) ** 2 - 1, 2 * (scale - 1)
        assert abs((gained - slopes).mean()) < 4 * (gained - slopes).std() / 4000**0.5


def used(optimizer):
    optimizer.eval()
    read = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.train()
    return read


class TestReadout:
    @each_base
    def test_ema_is_torchs_less_its_bias(self, base):
        model = torch.nn.ParameterList(parameters())
        averaged, first = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)), []
        optimizer = TORCH[base](model, **GIVEN[base])

        def average(params, starts, grads, step):
            averaged.update_parameters(model)
            first.extend(p.clone() for p in params if step == 1)

        optimizers = ours("ema({})", base, decay=0.9), optimizer
        assert_agree(*optimizers, after=average)
        missing = 0.9**STEPS
        pairs = zip(used(optimizers[0]), first, strict=True)
        assert_equal([(1 - missing) * x + missing * w for x, w in pairs], [*averaged.module])

    def test_ema_is_the_weighted_mean_of_all_weights(self):
        trained = []
        optimizer = ours("ema({})", "sgd", decay=0.8)
        descend(optimizer, after=lambda p, q, g, t: trained.append(p[0].clone()))
        weights = torch.tensor([0.8 ** (STEPS - i) for i in range(1, STEPS + 1)], dtype=F64)
        mean = torch.tensordot(weights / weights.sum(), torch.stack(trained), 1)
        assert_equal(used(optimizer)[0], mean)

    def test_ema_of_bfloat16_weights_keeps_moving(self):
        p = torch.nn.Parameter(torch.full((4,), 8.0, dtype=torch.bfloat16))
        optimizer = torch_form(find_rule("ema(sgd, decay=0.999)"))([p], lr=1.0)
        for step in range(500):
            p.grad = torch.full_like(p, 8.0 if step == 0 else 0.0)
            optimizer.step()
        # The weights are 0 from the first step on.
        assert optimizer.state[p]["average"].dtype == torch.float32
        assert not used(optimizer)[0].any()

    @pytest.mark.parametrize("alpha", [0.5, 0.8])
    @each_base
    def test_lookahead_is_pytorch_optimizers(self, base, alpha):
        other = pytorch_optimizer.Lookahead(theirs(base), k=4, alpha=alpha)
        optimizer = ours("lookahead({}, k=4)", base, alpha=alpha)
        assert_agree(optimizer, other)
        slow = [
            other.state[p]["slow_params"] for group in other.param_groups for p in group["params"]
        ]
        assert_equal(used(optimizer), slow)

    def test_lookahead_before_the_first_look_is_the_rule(self):
        optimizer = ours("lookahead({}, k=1000)", "adam")
        assert_agree(optimizer, theirs("adam"))
        assert_equal(used(optimizer), [p.detach() for p in parameters()])

    def test_lookahead_all_the_way_is_the_rule(self):
        assert_agree(ours("lookahead({})", "adam", alpha=1.0), theirs("adam"))

    def test_a_number_of_the_group_may_belong_to_a_rule_with_options(self):
        optimizer = torch_form(find_rule("lookahead(nadam)"))(parameters(), alpha=1.0, lr=0.05)
        assert_agree(optimizer, torch_form(RULES["nadam"])(parameters(), lr=0.05))

    def test_xgrad_of_sgd_is_the_papers(self):
        steps, lr, momentum = 1.7, 0.1, 0.7
        stored = [p.detach().numpy().copy() for p in parameters()]
        buffers = [0 * w for w in stored]
        for t in range(1, STEPS + 1):
            for i, w in enumerate(stored):
                ahead = w - steps * lr * buffers[i]
                g = gradient(torch.as_tensor(ahead), t, i).numpy()
                buffers[i] = momentum * buffers[i] + g
                stored[i] = w - lr * buffers[i]
        optimizer = ours("xgrad({})", "sgd", steps=steps)
        ahead = [w - steps * lr * b for w, b in zip(stored, buffers, strict=True)]
        assert_equal(descend(optimizer), [torch.as_tensor(x) for x in ahead])
        assert_equal(used(optimizer), [torch.as_tensor(w) for w in stored])

    def test_xgrad_of_adam_is_the_papers(self):
        steps, lr, beta1, beta2, eps = 0.6, 0.05, 0.8, 0.9, 1e-3
        stored = [p.detach().numpy().copy() for p in parameters()]
        slots = [(0 * w, 0 * w) for w in stored]

        def change(m, v, t):
            return lr / (1 - beta1**t) * m / (v**0.5 / (1 - beta2**t) ** 0.5 + eps)

        for t in range(1, STEPS + 1):
            for i, w in enumerate(stored):
                m, v = slots[i]
                ahead = w - steps * change(m, v, t - 1) if t > 1 else w
                g = gradient(torch.as_tensor(ahead), t, i).numpy()
                m, v = slots[i] = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
                stored[i] = w - change(m, v, t)
        optimizer = ours("xgrad({})", "adam", steps=steps)
        descend(optimizer)
        assert_equal(used(optimizer), [torch.as_tensor(w) for w in stored])

    def test_xgrad_around_a_clipped_rule_is_shown_what_it_trains(self):
        # Nothing is predicted at steps=0.
        optimizer = ours("xgrad(clip_norm({}, max_norm=1.0))", "adam", steps=0.0)
        assert_agree(optimizer, theirs("adam"), before=lambda params: clip_grad_norm_(params, 1.0))

    def test_ema_averages_what_the_rule_inside_reads_out(self):
        stored = []
        inside, outside = ours("xgrad({})", "adam"), ours("ema(xgrad({}))", "adam", decay=0.9)
        descend(inside, after=lambda p, q, g, t: stored.append(used(inside)[0]))
        descend(outside)
        weights = torch.tensor([0.9 ** (STEPS - i) for i in range(1, STEPS + 1)], dtype=F64)
        assert_equal(
            used(outside)[0], torch.tensordot(weights / weights.sum(), torch.stack(stored), 1)
        )

    @each_wrapper
    def test_what_changes_weights_does_not_go_around_what_keeps_others(self, name):
        if ALL[name].moves:
            with pytest.raises(
                ValueError, match=rf"{name} would change the weights that ema\(adam"
            ):
                find_rule(f"{name}(ema(adam))")
        else:
            assert find_rule(f"{name}(ema(adam))").readout

    @pytest.mark.parametrize("name", ["clip_norm(ema(adam))", "clip_tensor(ema(xgrad(sgd)))"])
    def test_goes_through_wrappers_that_have_none(self, name):
        rule, layout = find_rule(name), Layout.of({str(i): p for i, p in enumerate(parameters())})
        values = rule.values()
        p = noise(0, (sum(layout.sizes),))
        s = initial_slots(rule, layout, p, values)
        p, s = flat_step(rule, layout, p, p, s, torch.ones((), dtype=F64), values)
        assert_equal(flat_readout(rule, layout, p, s, values), s["average"])


class TestMaking:
    @each_wrapper
    def test_is_a_file_that_cites_its_source(self, name):
        assert any(str(year) in ALL[name].doc for year in range(1950, 2030))

    @each_wrapper
    def test_is_mathematics_only(self, name):
        tree = ast.parse(inspect.getsource(inspect.getmodule(ALL[name].body)))
        banned = {"math", "float", "item", "detach", "data", "numpy", "tolist", "no_grad"}
        named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        named |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not named & banned, "these cut the graph"

    @each_wrapper
    def test_numbers_of_the_whole_model_have_its_grain(self, name):
        if ALL[name].over == "model":
            assert {h.finest for h in ALL[name].hypers.values()} == {"shared"}

    def test_names_that_both_have_are_told_apart(self):
        rule = find_rule("clip_norm(clip_tensor(clip_norm(sgd)))")
        own = [n for n in rule.hypers if n not in RULES["sgd"].hypers]
        assert own == ["max_norm", "clip_tensor_max_norm", "clip_norm_max_norm"]
        twice = find_rule("ema(ema(sgd))")
        assert {*twice.slots} == {"momentum_buffer", "average", "ema_average"}
        masks = find_rule("cautious(cautious_weight_decay(sgd))")
        assert [*masks.choices] == ["nesterov", "smooth"]
        assert masks.hypers["cautious_temperature"].when == ("smooth", True)
        with pytest.raises(
            ValueError, match="has 'clip_norm_max_norm' and 'max_norm' already, so "
        ):
            find_rule("clip_norm(clip_norm(clip_norm(sgd)))")

    def test_each_has_its_own_value(self):
        def clip(params):
            clip_grad_norm_(params, 2.0)
            for p in params:
                clip_grad_norm_([p], 0.5)

        optimizer = ours("clip_norm(clip_tensor({}))", "sgd", max_norm=0.5, clip_norm_max_norm=2.0)
        assert_agree(optimizer, theirs("sgd"), before=clip)

    def test_defaults_are_of_hypers_and_of_options(self):
        assert find_rule("clip_norm(adamw, max_norm=0.5)").hypers["max_norm"].default == 0.5
        assert find_rule("lookahead(adam, k=3)").options() == {"k": 3}
        assert WRAPPERS["cautious"]("adam", smooth=True).options() == {"smooth": True}

    def test_options_of_a_rule_stay_in_force(self):
        nesterov = RULES["sgd"].choose(nesterov=True)
        rule = WRAPPERS["clip_norm"](nesterov, max_norm=1e9)
        assert rule.options() == {"nesterov": True}
        one, other = (torch_form(r)(parameters(), momentum=0.5) for r in (rule, nesterov))
        assert_agree(one, other)
        with pytest.raises(ValueError, match=r"clip_norm\(sgd, .*: nesterov=True needs momentum"):
            torch_form(rule)(parameters())

    def test_an_option_that_is_given_overrules_the_one_inside(self):
        smooth = find_rule("cautious(adam)").choose(smooth=True)
        assert WRAPPERS["cautious_weight_decay"](smooth).options() == {"smooth": True}
        overruled = WRAPPERS["cautious_weight_decay"](smooth, smooth=False)
        assert overruled.options() == {"smooth": False}

    def test_calls_the_rule_once(self):
        @wrapper()
        def twice(p, g, s, t, inner):
            return inner(inner(p, g), g), s

        @wrapper(over="tensor")
        def never(p, g, s, t, inner):
            return p, s

        p, t = noise(0, 3), torch.ones((), dtype=F64)
        for made, problem in (
            (twice("sgd"), "called sgd twice in one step; call it once"),
            (never("clip_norm(sgd)"), r"never did not call clip_norm\(sgd\)"),
        ):
            values = made.values()
            with pytest.raises(RuntimeError, match=problem):
                made(p, p, made.init(p, values), t, values)

    def test_over_tensors_it_has_slots_and_hypers_of_each_in_a_model_too(self):
        @wrapper(over="tensor", slots=RULES["adam"].slots, size=positive(1.0, (0.1, 10.0)))
        def counted(p, g, s, t, inner, size):
            m = s["m"] + size * g.mean()
            return inner(p, m), {**s, "m": m}

        layout = Layout.of({str(i): p for i, p in enumerate(parameters())})
        start = noise(0, (sum(layout.sizes),))
        ends = []
        for rule in (counted("sgd"), counted("clip_norm(sgd, max_norm=1e9)")):
            values = rule.values({"lr": 0.1}) | {"size": torch.tensor([1, 2, 3, 4], dtype=F64)}
            p, s = start, initial_slots(rule, layout, start, values)
            for step in range(1, 4):
                t = torch.tensor(step, dtype=F64)
                p, s = flat_step(rule, layout, p, torch.sin(p), s, t, values)
            ends.append((p, s["m"]))
        assert_equal(*ends)


NESTED = [
    "clip_norm(adamw, max_norm=0.5)",
    "ema(lookahead(cautious(adam), k=3))",
    "clip_norm(partition(sgd, adam))",
    "decoupled_weight_decay(random_scaling(sgd))",
]


@pytest.mark.parametrize("name", NESTED)
class TestCopies:
    def test_rules_are_pickled(self, name):
        rule = find_rule(name)
        last = {n: c.options[-1] for n, c in rule.choices.items() if hasattr(c, "options")}
        for each in (rule, rule.choose(**last)):
            assert pickle.loads(pickle.dumps(each)) == each
            assert copy.deepcopy(each) == each
        assert find_rule(rule.name) is find_rule(name)

    def test_torch_forms_go_on_as_copies_and_from_files(self, name):
        optimizer = torch_form(find_rule(name))(parameters(), lr=0.01)
        descend(optimizer, steps=5)
        file = io.BytesIO()
        torch.save(optimizer, file)
        file.seek(0)
        others = (
            copy.deepcopy(optimizer),
            pickle.loads(pickle.dumps(optimizer)),
            torch.load(file, weights_only=False),
        )
        end = descend(optimizer, steps=7)
        for other in others:
            assert all(map(torch.equal, descend(other, steps=7), end))


def test_a_rule_around_one_that_is_not_registered_is_pickled_as_its_parts():
    rule = WRAPPERS["clip_norm"](WRAPPERS["partition"]("sgd", "adam", where=is_first))
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert again != find_rule(rule.name)


def is_first(name, shape):
    return name == "0"


WRONG = [
    ("clip_norm", ValueError, "'clip_norm' goes around a rule; name that too: \"clip_norm.adamw"),
    ("clip_norm()", ValueError, r"goes around one rule, and 'clip_norm\(\)' names 0; write \"clip"),
    ("clip_norm(adam, sgd)", ValueError, r"one rule, and 'clip_norm\(adam, sgd\)' names 2; write"),
    ("partition(adam)", ValueError, r"goes around two rules, and .* names 1; write \"partition"),
    ("clip_norm(adamm)", ValueError, "there is no rule 'adamm'; did you mean 'adam'"),
    ("clip_nrm(adam)", ValueError, "no wrapper of rules 'clip_nrm'; did you mean 'clip_norm'"),
    ("adam(sgd)", ValueError, r"'adam' in 'adam\(sgd\)' is a rule and goes around none; write its"),
    ("clip_norm(adam", ValueError, r"there is no rule 'clip_norm\(adam'"),
    ("adam + sgd", ValueError, r"'adam \+ sgd' is no rule; write a name, or wrappers around one"),
    ("clip_norm('adam')", ValueError, "\"'adam'\" is no rule; write a name, or wrappers around"),
    ("clip_norm(*adam)", ValueError, r"'\*adam' is no rule; write a name"),
    ("", ValueError, "there is no rule ''; known: adabelief, adagrad,"),
    ("clip_norm(adam, maxnorm=1)", TypeError, "clip_norm has no argument 'maxnorm'; did you mean"),
    ("clip_norm(adam, **x)", ValueError, "is no value that a name can hold; write a number, or"),
    ("clip_norm(adam, max_norm=x)", ValueError, "'max_norm=x' is no value that a name can hold"),
    ("clip_norm(adam, max_norm='1')", TypeError, "clip_norm: max_norm='1' is not a number"),
    ("clip_norm(adam, max_norm=True)", TypeError, "clip_norm: max_norm=True is not a number"),
    ("clip_norm(adam, max_norm=-1)", ValueError, r"max_norm=-1 is outside \[0, inf\); its default"),
    ("lookahead(adam, k=0)", ValueError, r"k=0 is not a whole number in \[1, 1000\]"),
    ("cautious(adam, smooth=2)", ValueError, "smooth=2 is not one of False, True"),
    (5, TypeError, "5 is no rule; give its name, such as 'adamw', or a Rule"),
    (["adam"], TypeError, r"\['adam'\] is no rule; give its name"),
]


@pytest.mark.parametrize(("name", "kind", "problem"), WRONG, ids=[str(n) for n, _, _ in WRONG])
def test_nonsense_is_answered_with_what_would_do(name, kind, problem):
    with pytest.raises(kind, match=problem):
        find_rule(name)
