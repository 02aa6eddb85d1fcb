"""What slots hold, beside the memory that the methods were published with."""

from math import prod

import pytest
import torch

from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form

MATRIX, VECTOR, KERNEL = (64, 128), (128,), (8, 4, 3, 3)

# Numbers per weight of an m x n matrix, and of a kernel as the matrix m x (all other sides).
FORMULAS = {
    "adabelief": "2",
    "adagrad": "1",
    "adam": "2",
    "adamomentum": "2",
    "adamssm": "3",
    "adamw": "2",
    "adan": "4",
    "ademamix": "3",
    "aegd": "1",
    "aegdm": "2",
    "agnes": "2",
    "alphagrad": "1",
    "amsgrad": "3",
    "ano": "2",
    "anolog": "2",
    "asgo": "1 + min(m, n) / max(m, n)",
    "auon": "1",
    "cadamw": "2",
    "clion": "1",
    "dasgo": "1 + 1 / m",
    "deltagclip": "0",
    "deltagclipc": "0",
    # The start, the average, and what rounding takes off the weights.
    "dog": "3",
    "dynag": "1",
    "frugal": "2 * density",
    "grams": "2",
    "hybridauon": "1",
    "inducedmetric": "2 if form == 'rms' else 1",
    "ldog": "3",
    "lion": "1",
    "loginducedmetric": "1",
    "muon": "1",
    "nadam": "2",
    "normalizedsgd": "1",
    # AMSGrad's, the last gradient, and the weights that are not ahead.
    "optamsgrad": "5",
    "prodigy": "4",
    "psgdkron": "(m**2 + n**2) / (m * n) + 1",
    "psgdlra": "2 * rank + 2",
    "psgdxmat": "3",
    "radam": "2",
    "rmsprop": "3 if centered else 2",
    "sania": "1",
    # Roots are made at every step, so none are kept; the graft has a moment and a momentum.
    "scalableshampoo": "(m**2 + n**2) / (m * n) + 3",
    "schedulefreeadamw": "2",
    "schedulefreesgd": "1",
    "scion": "1",
    "sgd": "1",
    "shampoo": "(m**2 + n**2) / (m * n)",
    "signsgd": "0",
    "signum": "1",
    "snsm": "min(1, rank / min(m, n)) + 1 / min(m, n)",
    "stochasticnesterov": "2",
    "subsetnorm": "1 + 1 / min(m, n)",
    "subspacemomentum": "min(1, rank / min(m, n)) + 1",
    "truncatedadagrad": "1",
    "truncatedmodel": "0",
    "turbomuon": "1",
}
# Where vectors are not as matrices are: Adam's, or a matrix of their own.
OF_VECTORS = dict.fromkeys(
    ["asgo", "auon", "dasgo", "frugal", "hybridauon", "muon", "turbomuon"], "2"
)
OF_VECTORS |= dict.fromkeys(["snsm", "subsetnorm", "subspacemomentum", "psgdkron"], "2")
OF_VECTORS |= {"shampoo": "n", "scalableshampoo": "n + 3"}
# Where every side of a kernel counts.
SIDES = "(8**2 + 4**2 + 3**2 + 3**2) / (8 * 4 * 3 * 3)"
OF_KERNELS = {"psgdkron": f"{SIDES} + 1", "scalableshampoo": f"{SIDES} + 3", "shampoo": SIDES}
# Single numbers of the whole model, and of its three tensors or their seven sides.
NUMBERS = {"adamssm": 2, "nadam": 1, "schedulefreeadamw": 2, "schedulefreesgd": 2}
NUMBERS |= {"dog": 2, "inducedmetric": 1, "loginducedmetric": 1, "prodigy": 2, "psgdlra": 3}
NUMBERS |= {"stochasticnesterov": 1, "dynag": 3 * 4, "ldog": 3 * 2, "psgdkron": 7}

CHOSEN = [(name, {}) for name in RULES]
CHOSEN += [
    ("frugal", {"projector": projector, "density": density})
    for projector in ("columns", "rows", "randk")
    for density in (0.0, 0.125, 0.5, 1.0)
    # An eighth of 36 columns is no whole number.
    if (projector, density) != ("columns", 0.125)
]
CHOSEN += [(name, {"rank": 4}) for name in ("psgdlra", "snsm", "subspacemomentum")]
CHOSEN += [("rmsprop", {"centered": True}), ("inducedmetric", {"form": "rms"})]
each = pytest.mark.parametrize(("name", "options"), CHOSEN, ids=str)


def expected(rule):
    held = NUMBERS.get(rule.name, 0)
    for shape, others in ((MATRIX, {}), (VECTOR, OF_VECTORS), (KERNEL, OF_KERNELS)):
        formula = others.get(rule.name, FORMULAS[rule.name])
        m, n = (1, *shape) if len(shape) == 1 else (shape[0], prod(shape[1:]))
        held += prod(shape) * eval(formula, {"m": m, "n": n, **rule.options()})
    assert held == pytest.approx(round(held), abs=1e-9)
    return round(held)


def test_every_rule_has_a_formula():
    assert FORMULAS.keys() == RULES.keys()


@each
def test_slots_hold_what_the_formulas_say(name, options):
    rule = RULES[name].choose(**options)
    model = {str(i): torch.zeros(x) for i, x in enumerate((MATRIX, VECTOR, KERNEL))}
    layout = Layout.of(model)
    slots = initial_slots(rule, layout, layout.flatten(model), rule.values())
    assert sum(x.numel() for x in slots.values()) == expected(rule)


@each
def test_nor_does_the_torch_form_hold_more(name, options):
    params = [torch.nn.Parameter(torch.ones(x)) for x in (MATRIX, VECTOR, KERNEL)]
    optimizer = torch_form(RULES[name])(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    (group,) = optimizer.param_groups
    kept = [x for p in params for x in optimizer.state[p].values()]
    kept += [group[n] for n in optimizer.rule.slots if n in group]
    assert sum(x.numel() for x in kept) == expected(RULES[name].choose(**options))
    # Nor views of more.
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) <= sum(x.nbytes for x in kept)


def steps_of_rmsprop(p, gradients, switched):
    """Written out: centered from the step of that number on, with an average of 0 then."""
    square, mean, momentum = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for i, g in enumerate(gradients):
        square = 0.9 * square + 0.1 * g * g
        variance = square
        if i >= switched:
            mean = 0.9 * mean + 0.1 * g
            variance = square - mean * mean
        momentum = 0.5 * momentum + g / (variance.sqrt() + 0.1)
        p = p - 0.01 * momentum
    return p


# Of these one is stepped where it is, the others gathered, one of which has one element only.
@pytest.mark.parametrize("shapes", [((2**16,),), ((4, 3), (1,))], ids=str)
def test_a_slot_of_an_option_begins_when_that_is_switched_on(shapes):
    draw = torch.Generator().manual_seed(0)
    params, gradients = [], []
    for shape in shapes:
        params.append(torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)))
        gradients.append(torch.randn((6, *shape), generator=draw, dtype=torch.float64))
    optimizer = torch_form(RULES["rmsprop"])(params, alpha=0.9, eps=0.1, momentum=0.5)
    for i in range(6):
        if i == 3:
            assert {optimizer.state[p]["grad_avg"].numel() for p in params} == {0}
            snapshot = optimizer.state_dict()
            optimizer.load_state_dict(snapshot)
            assert {optimizer.state[p]["grad_avg"].numel() for p in params} == {0}
            optimizer.param_groups[0]["centered"] = True
        for p, g in zip(params, gradients, strict=True):
            p.grad = g[i]
        optimizer.step()
    for p, g in zip(params, gradients, strict=True):
        assert optimizer.state[p]["grad_avg"].shape == p.shape
        reference = steps_of_rmsprop(torch.ones_like(p), g, switched=3)
        torch.testing.assert_close(p.detach(), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    "rule",
    ["clip_norm(rmsprop)", "lookahead(rmsprop)", "cautious_weight_decay(rmsprop)"],
)
def test_nor_do_wrappers_hold_slots_of_other_options(rule, held):
    rule = find_rule(rule).choose(centered=held)
    model = {str(i): torch.zeros(x) for i, x in enumerate((MATRIX, VECTOR))}
    layout = Layout.of(model)
    p = layout.flatten(model)
    slots = initial_slots(rule, layout, p, rule.values())
    assert slots["grad_avg"].numel() == held * p.numel()
    after = flat_step(rule, layout, p, p + 1, slots, torch.ones((), dtype=torch.float64),
                      rule.values())[1]  # fmt: skip
    assert {n: x.shape for n, x in after.items()} == {n: x.shape for n, x in slots.items()}
