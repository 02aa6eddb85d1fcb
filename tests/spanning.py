"""Rules that between them have every trait which a contract may depend on.

What holds of every rule is tested on these each time, and on all of them with --thorough.
"""

from collections import Counter

from hyperdescent.inner.registry import RULES

# Those that most people use; first, so that what they cover is covered by them.
COMMON = ("sgd", "adamw", "muon")


def traits(rule):
    """What contracts distinguish rules by: what a rule is over, with what it needs, whether it has
    a readout, its kinds of slots and of hypers, and the options that several rules have.
    """
    shared = Counter(name for each in RULES.values() for name in each.choices)
    slots = {slot.shared for slot in rule.slots.values()} or {None}
    hypers = rule.hypers.values()
    return {
        *((rule.over, "needs", need) for need in rule.needs or (None,)),
        (rule.over, "readout", rule.readout is not None),
        *((rule.over, "shared slots", kind) for kind in slots),
        *((rule.over, "finest", hyper.finest) for hyper in hypers),
        *(("scale", hyper.scale) for hyper in hypers),
        *(("rough", bool(hyper.rough), hyper.smoothed) for hyper in hypers),
        *(("option", name) for name in rule.choices if shared[name] > 1),
    }


def _spanning():
    """Names of rules that have all traits there are: the common ones, then whichever has most of
    what is missing, the one with the fewest slots of several.
    """
    missing = set().union(*map(traits, RULES.values()))
    chosen = []
    for name in COMMON:
        chosen.append(name)
        missing -= traits(RULES[name])
    while missing:
        best = max(RULES.values(), key=lambda r: (len(traits(r) & missing), -len(r.slots)))
        chosen.append(best.name)
        missing -= traits(best)
    return tuple(chosen)


SPANNING = _spanning()
