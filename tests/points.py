"""For the tests that take every rule: which hyperparameters to look at, and at which values."""

import torch
from nets import VALUES
from oracle import references

from hyperdescent.inner.registry import RULES
from hyperdescent.testing.points import allowed, applies, middle, sloped, telling

F64 = torch.float64
REFERENCE = references()

# Where the loss is about 1 and its gradient about 0.1, as of the nets that tests train; points of
# references are for the contract's loss of 20.
OF_NETS = {
    "adagrad": {"lr": 0.2},
    "alphagrad": {"alpha": 3.0},
    "ano": {"beta2": 0.85},
    "asgo": {"aux_eps": 0.05},
    "clion": {"lr": 0.02},
    "deltagclip": {"gamma": 0.25, "delta": 0.6},
    "deltagclipc": {"gamma": 0.25, "delta": 0.6},
    "inducedmetric": {"beta": 0.8},
    "psgdkron": {"clip_rms": 0.5},
    "psgdlra": {"clip_rms": 0.3},
    "psgdxmat": {"clip_rms": 0.3},
    "sania": {"f_star": 0.5},
    "sgd": {"lr": 0.5},
    "truncatedadagrad": {"lr": 0.3, "floor": 0.5},
    "truncatedmodel": {"lr": 2.0, "floor": 0.7},
}


def reference_point(rule):
    """What the rule's reference has as its point."""
    return REFERENCE[rule.name].point if rule.name in REFERENCE else {}


def prepared(rule):
    """The rule with the whole-number options of its reference, which a few steps can tell."""
    chosen = REFERENCE[rule.name].chosen if rule.name in REFERENCE else {}
    return rule.choose(**chosen) if chosen else rule


def values_in_nets(rule):
    """Numbers at which every hyper of a rule moves the loss of the nets that tests train."""
    return telling(rule, VALUES | reference_point(rule) | OF_NETS.get(rule.name, {}))


EVERY_RULE = {name: prepared(rule) for name, rule in RULES.items()}


# Options that say how often an iteration is done.
_ITERATIONS = ("matalg_steps", "ns_steps")


def brief(rule):
    """The rule with as few iterations as it may have, where operations are what takes time."""
    return rule.choose(**{n: c.low for n, c in rule.choices.items() if n in _ITERATIONS})


__all__ = [
    "EVERY_RULE",
    "F64",
    "REFERENCE",
    "allowed",
    "applies",
    "brief",
    "middle",
    "prepared",
    "reference_point",
    "sloped",
    "telling",
    "values_in_nets",
]
