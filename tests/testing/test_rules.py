"""A rule that breaks a promise is told which, and a right one is not."""

import itertools

import pytest

import hyperdescent as hd
from hyperdescent.inner.compose.wrapper import Wrapper
from hyperdescent.inner.core.hyper import decay, learning_rate
from hyperdescent.inner.core.rule import rule
from hyperdescent.inner.core.slots import zeros
from hyperdescent.inner.registry import RULES, WRAPPERS
from hyperdescent.inner.wrappers import clip_norm
from hyperdescent.testing import check_rule, check_wrapper, rule_checks, wrapper_checks
from hyperdescent.testing.rules import check_mathematics_only


@rule("Right", slots={"m": zeros}, lr=learning_rate(0.1), beta=decay(0.9))
def right(p, g, s, t, lr, beta):
    m = beta * s["m"] + (1 - beta) * g
    return p - lr * m, {"m": m}


def broken(update, **options):
    declared = {"lr": learning_rate(0.1), "beta": decay(0.9)}
    return rule("Broken", slots={"m": zeros}, **declared, **options)(update)


def cut(p, g, s, t, lr, beta):
    m = beta.detach() * s["m"] + (1 - beta) * g
    return p - lr * m, {"m": m}


def idle(p, g, s, t, lr, beta):
    return p - lr * g, {"m": s["m"]}


def writing(p, g, s, t, lr, beta):
    g.mul_(1 - beta)
    return p - lr * g, {"m": beta * s["m"] + g}


def rooted(p, g, s, t, lr, beta):
    m = beta * s["m"] + (1 - beta) * g * g
    return p - lr * g / m.sqrt().add(1e-3), {"m": m}


def widening(p, g, s, t, lr, beta):
    m = beta * s["m"] + (1 - beta) * g.double()
    return p - (lr * m).to(p.dtype), {"m": m}


def summing(p, g, s, t, lr, beta):
    m = beta * s["m"] + (1 - beta) * g / g.abs().sum()
    return p - lr * m, {"m": m}


def test_a_right_one_passes():
    check_rule(right)
    assert len({check.name for check in rule_checks(right)}) == len([*rule_checks(right)])


@pytest.mark.parametrize(
    ("update", "options", "why"),
    [
        (cut, {}, "derivatives in hypers per shared are right"),
        (idle, {}, "does not depend on beta"),
        (writing, {}, "inputs stay|modified by an inplace operation|batch"),
        (rooted, {}, "without a gradient for .* all is finite"),
        (widening, {}, "types are kept"),
        (summing, {}, "one vector is the rule on each tensor.*say over='tensor'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_broken_one_is_told_what_and_what_to_do(update, options, why):
    with pytest.raises(
        AssertionError, match=f"(?s)the rule .* breaks its contract: .*({why})"
    ) as told:
        check_rule(broken(update, **options))
    assert "What to do: " in str(told.value)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_those_of_the_catalogue_pass(name):
    check_rule(RULES[name])


def test_a_wrapper_passes():
    check_wrapper(clip_norm)


@pytest.mark.parametrize("name", [n for n, made in WRAPPERS.items() if isinstance(made, Wrapper)])
def test_every_wrapper_composes(name):
    for check in itertools.islice(wrapper_checks(WRAPPERS[name]), 4):
        check.run()


def test_a_wrapper_whose_hyper_does_nothing_is_told():
    @hd.wrapper(factor=hd.hypers.positive(1.0, (0.1, 10.0)))
    def idling(p, g, s, t, inner, factor):
        return inner(p, g), s

    with pytest.raises(AssertionError, match=r"(?s)the wrapper idling breaks its contract.*factor"):
        check_wrapper(idling)


def halved(x):
    return x * float(x.new_tensor(0.5))


def calling(p, g, s, t, lr, beta):
    return p - lr * halved(g), {"m": beta * s["m"]}


def test_functions_that_a_rule_calls_are_read_too():
    with pytest.raises(AssertionError, match="halved uses float"):
        check_mathematics_only(broken(calling))
