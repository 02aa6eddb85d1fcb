"""Muon and Turbo-Muon beyond what tests/contracts asks: what they equal, and what they ignore."""

import pytest
import torch

from hyperdescent.inner.compose.partition import partition
from hyperdescent.inner.core.flat import flat_step, initial_slots
from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
NAMES = ["muon", "turbomuon"]


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def step(rule, p, g, s=None, t=1.0, **given):
    values = rule.values(given)
    s = rule.init(p, values) if s is None else s
    return rule(p, g, s, torch.tensor(t, dtype=F64), values)


def path(optimizer, p, gradient, steps=6):
    for i in range(steps):
        p.grad = gradient(i, p.detach()).clone()
        optimizer.step()
    return p.detach()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is of torch 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "theirs"), [("keller", "original"), ("moonlight", "match_rms_adamw")]
)
def test_equals_torchs_where_that_does_not_round_to_bfloat16(monkeypatch, scale, theirs, nesterov):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    given = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2, "nesterov": nesterov}

    def end(make, **more):
        p = torch.nn.Parameter(noise(0, 7, 4))
        return path(make([p], **given, **more), p, lambda i, p: p.sin() + noise(i, 7, 4))

    ours = end(torch_form(RULES["muon"]), scale=scale)
    # It divides by max(|x|, 1e-7) where Jordan's code, and so we, divides by |x| + 1e-7.
    torch.testing.assert_close(ours, end(torch.optim.Muon, adjust_lr_fn=theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_matrix_is_adams(name):
    def end(make, **given):
        p = torch.nn.Parameter(noise(0, 9))
        return path(make([p], **given), p, lambda i, p: p.sin() + noise(i, 9))

    ours = end(torch_form(RULES[name]), aux_lr=0.1, aux_weight_decay=0.2)
    theirs = end(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_the_matrix_of_its_outputs(name):
    p, g = noise(0, 6, 2, 3, 3), noise(1, 6, 2, 3, 3)
    whole, flat = (step(RULES[name], *pair)[0] for pair in [(p, g), (p.view(6, 18), g.view(6, 18))])
    assert torch.equal(whole, flat.view_as(whole))


@pytest.mark.parametrize("name", NAMES)
def test_scales_differ_by_what_the_shape_says(name):
    g = noise(1, 12, 3)
    moved = {
        scale: step(RULES[name].choose(scale=scale), torch.zeros_like(g), g)[0]
        for scale in ("keller", "moonlight", "spectral")
    }
    torch.testing.assert_close(moved["keller"], moved["spectral"])  # Of tall matrices, both 2.
    torch.testing.assert_close(moved["moonlight"], moved["keller"] / 2 * 0.2 * 12**0.5)
    g = g.mT
    wide = {
        scale: step(RULES[name].choose(scale=scale), torch.zeros_like(g), g)[0]
        for scale in ("keller", "spectral")
    }
    torch.testing.assert_close(wide["spectral"], wide["keller"] / 2)


@pytest.mark.parametrize("name", NAMES)
def test_moonlights_step_has_the_size_of_adamws(name):
    rule, g = RULES[name].choose(scale="moonlight"), noise(1, 24, 96)
    if name == "muon":
        rule = rule.choose(ns_coefficients="quintic")
    moved, _ = step(rule, torch.zeros_like(g), g, lr=1.0)
    # Singular values of 1 for all of the smaller side, but for the band.
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.032)


def test_muon_turns_with_its_weights_and_does_not_see_the_size_of_gradients():
    turn = torch.linalg.qr(noise(7, 5, 5))[0]

    def end(turned, size):
        p, s = turned @ noise(0, 5, 8), None
        for t in range(1, 6):
            p, s = step(RULES["muon"], p, size * turned @ noise(t, 5, 8), s, float(t))
        return p

    plain = end(torch.eye(5, dtype=F64), 1.0)
    torch.testing.assert_close(end(turn, 1.0), turn @ plain)
    torch.testing.assert_close(end(torch.eye(5, dtype=F64), 1e3), plain, rtol=0, atol=1e-6)


def test_an_average_and_a_sum_as_momentum_are_the_same_muon():
    muon = RULES["muon"].choose(nesterov=False)
    p, s, total = noise(0, 4, 6), None, 0
    for t in range(1, 6):
        g = noise(t, 4, 6)
        total = 0.95 * total + g
        alone, _ = step(muon, p, total, momentum=0.0)
        p, s = step(muon, p, g, s, float(t))
        torch.testing.assert_close(p, alone, rtol=0, atol=1e-7)


def test_turbos_four_steps_end_where_muons_five_do():
    g = noise(1, 64, 256)

    def band(rule, steps):
        moved, _ = step(rule.choose(ns_steps=steps), torch.zeros_like(g), g, lr=1.0, momentum=0.0)
        values = torch.linalg.svdvals(moved)
        return values.min().item(), values.max().item()

    turbo, muon = RULES["turbomuon"], RULES["muon"].choose(ns_coefficients="quintic")
    for low, high in (band(turbo, 4), band(muon, 5)):
        assert 0.977 < low < 0.979 and 1.03 < high < 1.033
    square = noise(2, 64, 64)
    turned = step(turbo, torch.zeros_like(square), square, lr=1.0, momentum=0.0)[0]
    u, _, vh = torch.linalg.svd(square)
    # The rows were scaled: close to the polar factor, and not it.
    assert 0.05 < (turned + u @ vh).norm() / 8 < 0.4


def test_turbo_does_not_scale_up_tiny_rows_in_full():
    rows = torch.linalg.qr(noise(0, 9, 2))[0].mT * torch.tensor([[1.0], [1e-6]], dtype=F64)
    moved, _ = step(RULES["turbomuon"], torch.zeros_like(rows), rows, lr=1.0, momentum=0.0)
    # Below 3e-4 a row is multiplied by 1e-7 ** -0.5, and then by the slopes of the steps at 0.
    slope = 3.9505 * 3.7418 * 2.8769 * 2.8366
    assert moved.norm(dim=1)[0].item() == pytest.approx(1, abs=0.05)
    assert moved.norm(dim=1)[1].item() == pytest.approx(1e-6 * 1e-7**-0.5 * slope, rel=0.05)


def test_slots_of_the_other_rule_are_empty():
    shapes = {"matrix": torch.zeros(3, 4), "kernel": torch.zeros(2, 3, 2), "bias": torch.zeros(5)}
    layout, muon = Layout.of(shapes), RULES["muon"]
    s = initial_slots(muon, layout, torch.zeros(29), muon.values())
    assert {n: x.numel() for n, x in s.items()} == {"momentum_buffer": 24, "aux_m": 5, "aux_v": 5}


def test_matrices_that_are_not_hidden_can_be_left_to_another_rule():
    def hidden(name, shape):
        return len(shape) > 1 and "embedding" not in name

    made = partition("muon", "adamw", where=hidden)
    params = {"embedding": noise(0, 5, 3), "layer": noise(1, 5, 3), "bias": noise(2, 5)}
    layout = Layout.of(params)
    p, g, t = layout.flatten(params), noise(3, 35), torch.tensor(1.0, dtype=F64)
    values = made.values({"rest_lr": 0.1})
    moved, _ = flat_step(made, layout, p, g, initial_slots(made, layout, p, values), t, values)
    moved, g = layout.unflatten(moved), layout.unflatten(g)
    for name, rule, given in (
        ("embedding", "adamw", {"lr": 0.1}),
        ("layer", "muon", {}),
        ("bias", "adamw", {"lr": 0.1}),
    ):
        alone, _ = step(RULES[rule], params[name], g[name], **given)
        torch.testing.assert_close(moved[name], alone, rtol=1e-13, atol=1e-14)
