"""One rule for some tensors and another for the rest, beside two optimizers side by side."""

import copy
import pickle

import pytest
import torch

from hyperdescent.inner.compose.partition import partition
from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES, find_rule
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
SHAPES = {"embed": (3, 4), "bias": (5,), "scale": (), "conv": (2, 3, 2, 2)}
SGD = {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.02}
ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01}
OURS = SGD | {f"rest_{n}": ADAM[n] for n in ("lr", "weight_decay")}
OURS |= {"betas": ADAM["betas"], "eps": ADAM["eps"]}


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def parameters():
    return {n: torch.nn.Parameter(noise(i, shape)) for i, (n, shape) in enumerate(SHAPES.items())}


def descend(params, *optimizers, steps=50):
    for step in range(steps):
        for i, p in enumerate(params.values()):
            p.grad = torch.sin(p.detach()) + noise(1000 * step + i, p.shape)
        for optimizer in optimizers:
            optimizer.step()
    return {n: p.detach() for n, p in params.items()}


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def side_by_side(first, *, one=torch.optim.SGD, other=torch.optim.Adam, given=SGD, rest=ADAM):
    """Where torch's optimizers take the tensors, those named first to the one."""
    params = parameters()
    return descend(
        params,
        one([p for n, p in params.items() if n in first], **given),
        other([p for n, p in params.items() if n not in first], **rest),
    )


def test_matrices_to_one_rule_and_the_rest_to_another():
    params = parameters()
    optimizer = torch_form(find_rule("partition(sgd, adam)"))(params.values(), **OURS)
    assert_equal(descend(params, optimizer), side_by_side({"embed", "conv"}))


def not_embed(name, shape):
    return len(shape) > 1 and name != "embed"


def test_the_torch_form_has_names_of_named_parameters():
    params = parameters()
    optimizer = torch_form(partition("sgd", "adam", where=not_embed))(params.items(), **OURS)
    assert_equal(descend(params, optimizer), side_by_side({"conv"}))


def test_and_a_flat_vector_those_of_its_layout():
    rule, params = partition("sgd", "adam", where=not_embed), parameters()
    layout = Layout.of(params)
    given = {n: x for n, x in OURS.items() if n != "betas"} | {"beta1": 0.8, "beta2": 0.9}
    values = rule.values(given)
    p = layout.flatten(params).detach()
    s = initial_slots(rule, layout, p, values)
    for step in range(50):
        drift = {n: noise(1000 * step + i, x.shape) for i, (n, x) in enumerate(params.items())}
        g, t = torch.sin(p) + layout.flatten(drift), torch.tensor(step + 1, dtype=F64)
        p, s = flat_step(rule, layout, p, g, s, t, values)
    assert_equal(layout.unflatten(p), side_by_side({"conv"}))


def test_names_are_empty_where_none_were_given():
    seen, params = set(), parameters()

    def look(name, shape):
        seen.add((name, shape))
        return True

    descend(params, torch_form(partition("sgd", "adam", where=look))(params.values()), steps=1)
    # A number is shown as the vector of one that rules see.
    shapes = {torch.Size(shape or (1,)) for shape in SHAPES.values()}
    assert seen == {("", shape) for shape in shapes}


def test_options_are_each_rules_own():
    first = RULES["sgd"].choose(nesterov=True)
    rule = partition(first, "sgd")
    assert rule.options() == {"nesterov": True, "rest_nesterov": False}
    params, rest = parameters(), {f"rest_{n}": x for n, x in SGD.items()}
    optimizer = torch_form(rule)(params.values(), **SGD, **rest, rest_dampening=0.5)
    expected = side_by_side(
        {"embed", "conv"},
        given=SGD | {"nesterov": True},
        other=torch.optim.SGD,
        rest=SGD | {"dampening": 0.5},
    )
    assert_equal(descend(params, optimizer), expected)
    assert rule.hypers["dampening"].when == ("nesterov", False)
    assert rule.hypers["rest_dampening"].when == ("rest_nesterov", False)
    with pytest.raises(ValueError, match="sgd: nesterov=True needs momentum"):
        torch_form(rule)(parameters().values(), **rest)


def test_smooth_is_one_option_for_both():
    rule = find_rule("partition(cautious(sgd), cautious(adam))")
    assert rule.options() == {"nesterov": False, "smooth": False}
    assert rule.hypers["rest_temperature"].when == ("smooth", True)
    assert rule.choose(smooth=True).rough() == {}


@pytest.mark.parametrize(
    "name", ["partition(sgd, partition(sgd, sgd))", "partition(partition(sgd, sgd), sgd)"]
)
def test_names_of_partitions_in_partitions_are_told_apart(name):
    rule = find_rule(name)
    names = [f"{'rest_' * depth}{n}" for depth in range(3) for n in RULES["sgd"].hypers]
    assert sorted(rule.hypers) == sorted(names)
    assert [*rule.choices] == ["nesterov", "rest_nesterov", "rest_rest_nesterov"]
    assert len(rule.slots) == 3


def test_three_rules():
    def is_conv(name, shape):
        return name == "conv"

    params = parameters()
    rule = partition("adamw", partition("sgd", "adam"), where=is_conv)
    given = {"lr": 0.2, "rest_lr": 0.1, "rest_rest_lr": 0.05}
    optimizer = torch_form(rule)(params.items(), **given, momentum=0.7)
    other = parameters()
    expected = descend(
        other,
        torch.optim.AdamW([other["conv"]], lr=0.2),
        torch.optim.SGD([other["embed"]], lr=0.1, momentum=0.7),
        torch.optim.Adam([other["bias"], other["scale"]], lr=0.05),
    )
    assert_equal(descend(params, optimizer), expected)


def test_the_prefix_may_be_another():
    rule = partition("sgd", "adam", prefix="aux_")
    assert "aux_lr" in rule.hypers
    assert find_rule(rule.name) == rule
    with pytest.raises(ValueError, match="both rules have 'lr'; give a prefix that is not empty"):
        partition("sgd", "adam", prefix="")


def test_slots_take_no_memory_where_they_are_the_other_rules():
    params = parameters()
    optimizer = torch_form(find_rule("partition(sgd, adam)"))(params.values())
    descend(params, optimizer, steps=1)
    sizes = {
        n: {name: x.numel() for name, x in optimizer.state[p].items()} for n, p in params.items()
    }
    for name, shape in SHAPES.items():
        count, first = torch.Size(shape).numel(), len(shape) > 1
        expected = {"momentum_buffer": count * first, "m": count * (not first)}
        assert sizes[name] == expected | {"v": expected["m"]}


def test_weights_to_use_are_each_rules_own():
    params = parameters()
    optimizer = torch_form(find_rule("partition(ema(sgd), adam)"))(params.values(), **OURS)
    trained = {n: p.clone() for n, p in descend(params, optimizer).items()}
    optimizer.eval()
    for name, p in params.items():
        matrix = p.ndim > 1
        assert torch.equal(p, trained[name]) is not matrix
        assert not matrix or torch.equal(p.detach(), optimizer.state[p]["average"])


def test_is_pickled_and_copied_with_its_condition():
    rule = partition("sgd", "adam", where=not_embed)
    assert pickle.loads(pickle.dumps(rule)) == rule
    params = parameters()
    optimizer = torch_form(rule)(params.items(), **OURS)
    descend(params, optimizer, steps=5)
    again, its = copy.deepcopy((optimizer, params))
    assert_equal(descend(its, again, steps=7), descend(params, optimizer, steps=7))


def test_wrong_parts_are_named():
    problem = r"clip_norm\(sgd\) acts on a whole model, so it cannot have a part of one; .* around"
    with pytest.raises(ValueError, match=problem):
        partition("clip_norm(sgd)", "adam")
    with pytest.raises(TypeError, match="where='embed' is no function of the name and the shape"):
        partition("sgd", "adam", where="embed")
    with pytest.raises(ValueError, match="there is no rule 'adamm'; did you mean 'adam'"):
        partition("sgd", "adamm")
