"""The rules that stand for all of them have all that contracts distinguish rules by."""

from spanning import COMMON, SPANNING, traits

from hyperdescent.inner.registry import RULES


def test_every_trait_is_there():
    there = set().union(*(traits(RULES[name]) for name in SPANNING))
    missing = {name: traits(rule) - there for name, rule in RULES.items()}
    assert {name: lacking for name, lacking in missing.items() if lacking} == {}


def test_they_are_few_and_the_common_ones_are_among_them():
    assert set(COMMON) <= set(SPANNING) and len(set(SPANNING)) == len(SPANNING) <= 15
