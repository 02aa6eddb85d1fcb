"""What every registered rule promises. A new rule earns all of this for one line in the REFERENCE
of a module of tests/oracles.
"""

import itertools
import math

import pytest
import torch
from points import F64, REFERENCE, reference_point

from hyperdescent.inner.core.hyper import Choice
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form
from hyperdescent.testing import paths
from hyperdescent.testing import rules as contract
from hyperdescent.testing.paths import (
    SHAPES,
    defaults,
    descend,
    grouped,
    noise,
    parameters,
    weights,
)
from hyperdescent.testing.points import applies, middle

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
        for granularity in (SHAPES if thorough(each.values[0]) else ["shared"])
    ],
)


def point(rule, **changed):
    return paths.point(rule, reference_point(rule), **changed)


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


class TestGradient:
    @each_in_grains
    def test_is_right_in_every_hyperparameter(self, rule, granularity):
        contract.check_gradient(rule, reference_point(rule), granularity)

    @each_thorough
    def test_is_right_in_forward_mode(self, rule):
        contract.check_forward_gradient(rule, reference_point(rule))

    @each_variant
    def test_every_hyperparameter_moves_the_path(self, rule):
        contract.check_every_hyper_matters(rule, reference_point(rule))

    @pytest.mark.parametrize("where", ["a whole tensor and one element", "everywhere"])
    @pytest.mark.parametrize("start", ["defaults", "point"])
    @each_variant
    def test_is_finite_where_weights_never_get_a_gradient(self, rule, start, where):
        values = defaults(rule) if start == "defaults" else point(rule, weight_decay=0.0)
        contract.check_dead_weights(rule, values, where)

    @each_variant
    def test_second_derivatives_are_finite_too(self, rule):
        contract.check_second_derivatives(rule)

    @each_variant
    def test_a_batch_of_hyperparameters_is_a_loop_over_them(self, rule):
        contract.check_batch(rule, reference_point(rule))


class TestForm:
    @each_variant
    def test_inputs_are_untouched(self, rule):
        contract.check_inputs_untouched(rule, reference_point(rule))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @each_in_grains
    def test_dtype_and_shape_are_kept(self, rule, dtype, granularity):
        contract.check_types_and_shapes(rule, reference_point(rule), dtype, granularity)

    @each_variant
    def test_dtype_is_kept_where_one_hyperparameter_has_a_grain_of_its_own(self, rule):
        contract.check_types_by_tensor(rule, reference_point(rule))

    @each_in_grains
    def test_flat_step_is_the_rule_on_each_tensor(self, rule, granularity):
        contract.check_flat_step(rule, reference_point(rule), granularity)

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
    @each_variant
    def test_torch_form_is_the_rule(self, rule, dtype):
        contract.check_torch_form(rule, reference_point(rule), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @each_variant
    def test_a_resumed_run_is_bit_identical(self, rule, dtype):
        contract.check_resume(rule, reference_point(rule), dtype)


def test_hypers_without_a_useful_derivative_are_counted():
    rough = {name: set(rule.rough()) for name, rule in RULES.items()}
    assert rough == {name: set(known.rough) for name, known in REFERENCE.items()}


class TestFile:
    @each_rule
    def test_is_pickled_with_its_options_and_slots(self, rule):
        contract.check_pickling(rule)

    @each_rule
    def test_is_mathematics_only(self, rule):
        contract.check_mathematics_only(rule)

    @each_rule
    def test_cites_its_source(self, rule):
        assert any(str(year) in rule.doc for year in range(1950, 2030)) or "arXiv:" in rule.doc

    @each_rule
    def test_is_registered_under_the_class_name_in_lower_case(self, rule):
        assert rule.name == rule.title.lower()
