"""Prodigy and schedule-free training."""

import pytest
import pytorch_optimizer
import torch
from walks import F64, noise, number, walk

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form


def bowl(optimizer, steps):
    """Steps on half the square of the weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


class TestProdigy:
    def test_is_the_authors_to_rounding_where_the_first_steps_have_digits(self):
        shapes = [(3, 4), (2, 3, 2, 2)]
        ours, theirs = ([torch.nn.Parameter(noise(*shape)) for shape in shapes] for _ in range(2))
        given = {"d0": 1e-2, "weight_decay": 0.1, "lr": 0.5}
        default = torch.get_default_dtype()
        torch.set_default_dtype(F64)  # Its sums are of the default dtype.
        try:
            end = bowl(pytorch_optimizer.Prodigy(theirs, foreach=False, **given), 30)
        finally:
            torch.set_default_dtype(default)
        torch.testing.assert_close(
            bowl(torch_form(RULES["prodigy"])(ours, **given), 30), end, rtol=1e-13, atol=1e-13
        )

    def test_the_estimate_does_not_depend_on_the_scale_of_gradients(self):
        g, given = noise(30, 4) + 0.5, {"eps": 0.0}
        ends = [walk("prodigy", scale * g, given)[-1] for scale in (1.0, 64.0)]
        torch.testing.assert_close(*(p for p, _ in ends), rtol=1e-13, atol=0)
        assert ends[0][1]["d"] > 1e-5, "it grew"

    def test_the_estimate_is_below_the_distance(self):
        # As the theory says of convex losses: at the minimum 0 of the length from 0.
        p = noise(8)
        optimizer = torch_form(RULES["prodigy"])([torch.nn.Parameter(p.clone())])
        bowl(optimizer, 100)
        d = optimizer.param_groups[0]["d"]
        assert 0.1 * p.abs().max() < d <= p.abs().max()

    def test_the_estimate_leaves_its_start_in_bfloat16(self):
        optimizer = torch_form(RULES["prodigy"])([torch.nn.Parameter(noise(8).bfloat16())])
        bowl(optimizer, 100)
        assert optimizer.param_groups[0]["d"] > 0.1

    def test_float16_is_float32_to_rounding(self):
        # Gradients whose squares, and squared steps of d0, float16 has no numbers for.
        ends = []
        for dtype in (torch.float16, torch.float32):
            p = torch.nn.Parameter(noise(2, 8).to(torch.float16).to(dtype))
            optimizer = torch_form("prodigy")([p])
            for _ in range(60):
                p.grad = p.detach() * torch.tensor([[1e-3], [1e3]], dtype=dtype)
                optimizer.step()
            ends.append(p.detach().float())
        torch.testing.assert_close(*ends, rtol=0.02, atol=0.02)
        assert optimizer.param_groups[0]["d"] > 1e-3, "it grew"

    def test_nothing_moves_before_the_first_gradient(self):
        (p, s) = walk("prodigy", torch.zeros(3, 2, dtype=F64))[-1]
        assert torch.equal(p, torch.ones(2, dtype=F64))
        assert s["d"] == 1e-6


class TestScheduleFree:
    def test_the_readout_is_the_mean_of_the_iterates(self):
        seen = walk("schedulefreesgd", noise(10, 4), {"lr": 0.1})
        iterates = torch.stack([s["z"] for _, s in seen])
        p, s = seen[-1]
        rule = RULES["schedulefreesgd"]
        average = rule.readout(p, s, rule.values(), None)
        torch.testing.assert_close(average, iterates.mean(0), rtol=1e-13, atol=0)

    def test_is_the_papers_three_sequences(self):
        rule, g, beta = RULES["schedulefreesgd"], noise(10, 4), 0.7
        rates = [0.0, 0.1, 0.2, 0.3, 0.3, 0.1, 0.4, 0.4, 0.05, 0.4]  # With a warm-up from 0.
        p = x = z = torch.ones(4, dtype=F64)
        s, weights = rule.init(p, rule.values()), []
        for step, (each, rate) in enumerate(zip(g, rates, strict=True), 1):
            values = rule.values({"lr": rate, "momentum": beta, "r": 0.5})
            p, s = rule(p, each, s, number(float(step)), values)
            weights.append(step**0.5 * max(rates[:step]) ** 2)
            share = weights[-1] / sum(weights) if sum(weights) else 0.0
            z = z - rate * each
            x = (1 - share) * x + share * z
            torch.testing.assert_close(p, (1 - beta) * z + beta * x, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(rule.readout(p, s, values, None), x, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("title", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
    def test_eval_gives_the_average_as_theirs_does(self, title):
        given = {"lr": 0.1, "weight_decay": 0.1}
        ours, theirs = (torch.nn.Parameter(noise(3, 4, 2, 2)) for _ in range(2))
        optimizers = (
            torch_form(RULES[title.lower()])([ours], **given),
            getattr(pytorch_optimizer, title)([theirs], foreach=False, **given),
        )
        for optimizer in optimizers:
            bowl(optimizer, 20)
            optimizer.eval()
        # Theirs has 1e-15 more under the root of the second moment.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("name", "given"), [("schedulefreesgd", "momentum"), ("schedulefreeadamw", "beta1")]
    )
    def test_an_average_that_cannot_be_read_is_refused(self, name, given):
        with pytest.raises(ValueError, match=f"{given} must be > 0"):
            torch_form(RULES[name])([torch.nn.Parameter(torch.ones(1))], **{given: 0.0})
