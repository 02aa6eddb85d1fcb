"""Schedules against torch's schedulers, or the formula as a plain loop, and in every knob."""

import math
from functools import partial

import pytest
import torch
from pytorch_optimizer.lr_scheduler import CosineAnnealingWarmupRestarts, REXScheduler
from torch.optim import lr_scheduler

from hyperdescent.inner.core.hyper import decay, learning_rate
from hyperdescent.inner.schedules.schedule import SCHEDULES, Schedule, find_schedule, piecewise
from hyperdescent.inner.schedules.shapes import sgdr

DOUBLE = torch.float64
LR, BETA = learning_rate(1e-3), decay(0.9)
STEPS = 20
KNOBS = {
    "peak": 0.3,
    "warmup": 0.25,
    "decay": 0.35,
    "up": 0.4,
    "floor": 0.1,
    "power": 1.7,
    "div": 10.0,
    "final_div": 50.0,
    "period": 0.2,
    "mult": 2.0,
    "gamma": 0.6,
}


def knobs(schedule, hyper=LR, steps=STEPS, **given):
    """Legal knobs, the hyper's own kind varying from knot to knot."""
    made = {}
    for name, knob in schedule.knobs(hyper, steps).items():
        flat = torch.tensor(given.get(name, KNOBS.get(name, 0.3)), dtype=DOUBLE)
        wave = torch.linspace(0.5, 1.0, math.prod(knob.shape), dtype=DOUBLE)
        made[name] = flat * wave.reshape(knob.shape) if knob.shape else flat
    return made


def table(spec, hyper=LR, steps=STEPS, **given):
    schedule = find_schedule(spec)
    return schedule.table(steps, knobs(schedule, hyper, steps, **given), hyper)


def torchs(make, lr=0.3, steps=STEPS):
    """The rates a torch scheduler puts in force at each step."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(opt)
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return torch.tensor(rates, dtype=DOUBLE)


# Each spec, its knobs, and torch's scheduler with the same meaning.
TORCH = {
    "constant": partial(lr_scheduler.ConstantLR, factor=1.0),
    "linear_warmup": partial(lr_scheduler.LinearLR, start_factor=1 / 5, total_iters=4),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS, eta_min=0.1 * 0.3),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=STEPS, power=1.7),
    "one_cycle": partial(
        lr_scheduler.OneCycleLR,
        max_lr=0.3,
        total_steps=STEPS + 1,
        pct_start=0.4,
        div_factor=10,
        final_div_factor=50,
        cycle_momentum=False,
    ),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.1 ** (1 / STEPS)),
    "step_decay:4": partial(lr_scheduler.StepLR, step_size=5, gamma=0.6),
    "sgdr": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4, T_mult=2, eta_min=0.1 * 0.3),
}


@pytest.mark.parametrize("spec", TORCH)
def test_is_torchs(spec):
    given = {"polynomial": {"floor": 0.0}, "sgdr": {"gamma": 1.0}}.get(spec, {})
    # torch's one-cycle refuses to be asked for the step after its last, so it gets one step more.
    steps = STEPS + 1 if spec == "one_cycle" else STEPS
    expected = torchs(TORCH[spec])[:STEPS]
    torch.testing.assert_close(
        table(spec, steps=steps, **given)[:STEPS], expected, rtol=1e-12, atol=0
    )


# Of pytorch_optimizer; before its first step() the rate is another one.
THEIRS = {
    "rex": partial(REXScheduler, total_steps=STEPS, max_lr=0.3, min_lr=0.03),
    "sgdr": partial(
        CosineAnnealingWarmupRestarts,
        first_cycle_steps=4,
        cycle_mult=2.0,
        max_lr=0.3,
        min_lr=0.03,
        gamma=0.6,
    ),
}


@pytest.mark.parametrize("spec", THEIRS)
def test_is_pytorch_optimizers(spec):
    expected = torchs(THEIRS[spec])[1:]
    torch.testing.assert_close(table(spec)[1:], expected, rtol=1e-12, atol=0)


def test_inverse_sqrt_is_that_of_transformers():
    width, warmup = 512, 5

    def rate(i):
        return width**-0.5 * min((i + 1) ** -0.5, (i + 1) * warmup**-1.5)

    expected = torchs(partial(lr_scheduler.LambdaLR, lr_lambda=rate), lr=1.0)
    peak = (width * warmup) ** -0.5
    actual = table("inverse_sqrt", peak=peak, warmup=warmup / STEPS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_inverse_sqrt_without_a_warmup_begins_at_the_peak():
    expected = [0.3 / math.sqrt(i + 1) for i in range(STEPS)]
    actual = table("inverse_sqrt", warmup=0.0)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=DOUBLE))


class TestRestarts:
    def counted(self, first, mult, steps, gamma, floor=0.1, peak=0.3):
        """Cycle by cycle, in Python numbers."""
        rates, begin, length, top = [], 0.0, float(first), 1.0
        for i in range(steps):
            while i >= begin + length - 1e-9:
                begin, length, top = begin + length, length * mult, top * gamma
            down = (1 + math.cos(math.pi * (i - begin) / length)) / 2
            rates.append(peak * (floor + (top - floor) * down))
        return torch.tensor(rates, dtype=DOUBLE)

    @pytest.mark.parametrize("mult", [1.0, 1.25, 2.0, 3.0])
    @pytest.mark.parametrize("first", [1, 3, 7, 10, 4.3])
    def test_every_restart_is_in_time(self, mult, first):
        """Also where logarithms round to just below a whole number of cycles."""
        steps = 500
        actual = table("sgdr", steps=steps, period=first / steps, mult=mult, gamma=0.99)
        expected = self.counted(first, mult, steps, 0.99)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    def test_one_cycle_of_the_whole_training_is_a_cosine(self):
        torch.testing.assert_close(table("sgdr", period=1.0), table("cosine"), rtol=1e-13, atol=0)

    @pytest.mark.parametrize("mult", [1.0, 1 + 1e-7, 1 + 2e-6, 1 + 1e-4])
    def test_the_slope_in_mult_where_cycles_are_nearly_equal(self, mult):
        values = knobs(sgdr(), period=0.22, mult=mult, gamma=0.6)
        values = {n: v.requires_grad_() for n, v in values.items()}
        (slope,) = torch.autograd.grad(sgdr().table(STEPS, values, LR)[16], values["mult"])
        # Step 16 is in cycle 3, begun at 4.4 (1 + m + m²), of 4.4 m³ steps.
        first, m, floor, top = 4.4, mult, 0.1, 0.6**3
        done = (16 - first * (1 + m + m * m)) / (first * m**3)
        moved = -(1 + 2 * m) / m**3 - 3 * done / m
        expected = -0.3 * (top - floor) * math.pi / 2 * math.sin(math.pi * done) * moved
        assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_too_few_stages():
    with pytest.raises(ValueError, match="at least 2 stages, not 1; use 'constant'"):
        find_schedule("step_decay:1")


def wsd(shape, i, warmup=0.25, down=0.35, floor=0.1, peak=0.3):
    """The formula of Hu et al. 2024 in Python numbers."""
    up = min((i + 1) / (warmup * STEPS), 1)
    begin = STEPS - down * STEPS
    u = max(0.0, (i - begin) / (down * STEPS))
    left = {"linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2, "1-sqrt": 1 - u**0.5}[shape]
    return peak * up * (floor + (1 - floor) * left)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_is_its_formula(shape):
    expected = torch.tensor([wsd(shape, i) for i in range(STEPS)], dtype=DOUBLE)
    actual = table(f"warmup_stable_decay:{shape}")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert float(actual.max()) == 0.3


def test_polynomial_ends_at_its_floor():
    expected = [0.3 * (0.1 + 0.9 * (1 - i / STEPS) ** 1.7) for i in range(STEPS)]
    torch.testing.assert_close(table("polynomial"), torch.tensor(expected, dtype=DOUBLE))


class TestPiecewise:
    def test_interpolates_rates_by_factors_and_shares_by_odds(self):
        at = torch.tensor([0.1, 0.4], dtype=DOUBLE)
        rates = piecewise(2).table(3, {"knots": at}, LR)
        assert float(rates[1]) == pytest.approx(math.sqrt(0.1 * 0.4))
        shares = piecewise(2).table(3, {"knots": at}, BETA)
        odds = math.sqrt(0.1 / 0.9 * 0.4 / 0.6)
        assert float(shares[1]) == pytest.approx(odds / (1 + odds))

    @pytest.mark.parametrize("hyper", [LR, BETA], ids=["log", "logit"])
    @pytest.mark.parametrize("steps", [1, 2, 7, 20])
    def test_equal_knots_are_constant(self, hyper, steps):
        knots = torch.full((5,), 0.3, dtype=DOUBLE)
        actual = piecewise(5).table(steps, {"knots": knots}, hyper)
        torch.testing.assert_close(actual, torch.full((steps,), 0.3, dtype=DOUBLE))

    def test_is_exact_at_the_knots(self):
        knots = torch.tensor([0.1, 0.7, 0.2, 0.4, 0.3], dtype=DOUBLE)
        actual = piecewise(5).table(21, {"knots": knots}, LR)
        torch.testing.assert_close(actual[::5], knots, rtol=1e-15, atol=0)
        between = actual[1:5]
        assert bool(((between > 0.1) & (between < 0.7)).all())

    def test_more_knots_than_steps_uses_those_it_meets(self):
        knots = torch.linspace(0.1, 0.9, 9, dtype=DOUBLE)
        actual = piecewise(9).table(3, {"knots": knots}, LR)
        torch.testing.assert_close(actual, knots[[0, 4, 8]])

    def test_too_few_knots(self):
        with pytest.raises(ValueError, match="at least 2 knots, not 1; use 'constant'"):
            find_schedule("piecewise:1")
        with pytest.raises(ValueError, match="at least 2 knots, not -3"):
            find_schedule("piecewise:-3")


def test_free_is_its_values():
    values = torch.rand(STEPS, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(find_schedule("free").table(STEPS, {"steps": values}, LR), values)


SPECS = [
    *sorted({*SCHEDULES} - {"piecewise"}),
    "piecewise:5",
    "warmup_stable_decay:cosine",
    "warmup_stable_decay:1-sqrt",
    "step_decay:5",
]
# Shares of training that end between two steps: a clamp has no slope where it begins to act.
BETWEEN = {"warmup": 0.22, "decay": 0.33, "up": 0.37, "period": 0.22, "mult": 1.7}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("hyper", [LR, BETA], ids=["log", "logit"])
class TestEverySchedule:
    def test_gradient_in_every_knob(self, spec, hyper):
        schedule = find_schedule(spec)
        values = knobs(schedule, hyper, **BETWEEN)

        def values_at(*leaves):
            return schedule.table(STEPS, dict(zip(values, leaves, strict=True)), hyper)

        leaves = [v.requires_grad_() for v in values.values()]
        assert torch.autograd.gradcheck(values_at, leaves)
        slopes = torch.autograd.grad(values_at(*leaves).sum(), leaves)
        assert all(bool(slope.all()) for slope in slopes), "a knob that moves nothing"

    def test_a_value_of_any_grain(self, spec, hyper):
        """One column per tensor, each what it would be alone."""
        schedule, wide = find_schedule(spec), hyper.shaped(3)
        values = knobs(schedule, wide)
        whole = schedule.table(STEPS, values, wide)
        assert whole.shape == (STEPS, 3)
        declared = schedule.knobs(wide, STEPS)
        for column in range(3):
            alone = {
                n: v[..., column] if declared[n].shape[-1:] == (3,) else v
                for n, v in values.items()
            }
            torch.testing.assert_close(schedule.table(STEPS, alone, hyper), whole[:, column])

    def test_stays_legal(self, spec, hyper):
        hyper.check("value", table(spec, hyper))

    def test_its_defaults_are_legal_and_finite(self, spec, hyper):
        schedule = find_schedule(spec)
        declared = schedule.knobs(hyper, STEPS)
        values = {
            n: torch.full(knob.shape, knob.default, dtype=DOUBLE) for n, knob in declared.items()
        }
        for name, knob in declared.items():
            knob.check(name, values[name])
        assert bool(schedule.table(STEPS, values, hyper).isfinite().all())

    def test_one_step_is_finite(self, spec, hyper):
        assert bool(table(spec, hyper, steps=1).isfinite().all())


class TestFinding:
    def test_a_schedule_is_itself(self):
        made = piecewise(3)
        assert find_schedule(made) is made
        assert isinstance(find_schedule("cosine"), Schedule)

    def test_the_argument_is_kept_in_the_name(self):
        for spec in ("piecewise:4", "warmup_stable_decay:cosine", "step_decay:7", "cosine"):
            assert find_schedule(spec).name == spec

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("cosin", "there is no schedule 'cosin'; did you mean 'cosine'"),
            ("", "there is no schedule ''"),
            ("cosine:3", "schedule 'cosine:3': cosine cannot take '3'"),
            ("piecewise:many", "piecewise.*'many'"),
            ("warmup_stable_decay:sqrt", "has no shape 'sqrt'; did you mean '1-sqrt'"),
            ("warmup_stable_decay:2", "warmup_stable_decay.*2"),
            ("step_decay:many", "step_decay cannot take 'many'"),
            ("sgdr:2", "sgdr cannot take '2'"),
        ],
    )
    def test_what_does_not_exist_is_refused(self, spec, message):
        with pytest.raises(ValueError, match=message):
            find_schedule(spec)
