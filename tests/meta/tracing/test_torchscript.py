"""Traced operations as TorchScript and as narrow products: the same numbers as before."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperdescent.inner.fx_graph import aten, retraced
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing import cost_model as price
from hyperdescent.meta.tracing.matmul_layout import narrow_transposed
from hyperdescent.meta.tracing.torchscript import scripted
from hyperdescent.meta.training.cache import cache_of
from hyperdescent.meta.training.training import Training


def targets(graph):
    return [n.target for n in graph.graph.nodes]


class TestScripted:
    def assert_same(self, function, *inputs):
        graph = retraced(function, inputs)
        run = scripted(graph)
        assert run is not graph
        with torch.no_grad():
            for _ in range(3):  # Its executor watches two runs before it settles.
                torch.manual_seed(0)
                found = run(*inputs)
                torch.manual_seed(0)
                for x, y in zip(found, graph(*inputs), strict=True):
                    assert x.dtype == y.dtype and torch.equal(x, y)

    def test_net_with_its_gradient(self):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten())
        x = torch.randn(3, 1, 5, 5)

        def step(weight, x):
            weight = weight.detach().requires_grad_()
            out = torch.func.functional_call(net, {"0.weight": weight}, (x,))
            return [out.detach(), *torch.autograd.grad(out.square().sum(), weight)]

        self.assert_same(step, net[0].weight.detach(), x)

    def test_draws(self):
        self.assert_same(lambda x: [torch.dropout(x, 0.5, True), torch.rand_like(x)], torch.ones(9))

    def test_constants_and_what_is_not_finite(self):
        held = torch.arange(4.0)
        self.assert_same(
            lambda x: [(x + held).clamp(max=float("inf")), x.masked_fill(x > 1, float("-inf"))],
            held.sqrt(),
        )

    def test_types_and_lists(self):
        self.assert_same(
            lambda x, i: [
                x.to(torch.float64),
                x[:, i],
                *x.split([1, 2]),
                torch.zeros(2, dtype=torch.int64, device="cpu"),
            ],
            torch.randn(3, 4),
            torch.tensor([0, 3]),
        )

    def test_falls_back_to_the_graph(self):
        graph = retraced(lambda x: [x.sin()], [torch.ones(2)])
        graph.graph.find_nodes(op="call_function", target=aten.sin.default)[0].target = torch.sin
        graph.recompile()
        assert scripted(graph) is graph

    def test_warns_of_nothing(self):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            scripted(retraced(lambda x: [x.sin()], [torch.ones(2)]))(torch.ones(2))
        assert not warned


class TestNarrowProducts:
    @pytest.mark.parametrize("bias", [False, True])
    def test_are_transposed(self, bias):
        layer = nn.Linear(12, 10, bias=bias).double()
        x = torch.randn(64, 12, dtype=torch.float64)
        graph = retraced(lambda x: [layer(x)], [x])
        narrow_transposed(graph)
        assert aten.addmm.default not in targets(graph)
        (product,) = graph.graph.find_nodes(op="call_function", target=aten.mm.default)
        assert product.meta["val"].shape == (10, 64)
        torch.testing.assert_close(graph(x)[0], layer(x), rtol=1e-14, atol=1e-14)

    def test_keep_their_layout(self):
        layer, x = nn.Linear(12, 10), torch.randn(64, 12)
        graph = retraced(lambda x: [(layer(x) + 1).view(-1)], [x])
        narrow_transposed(graph)
        torch.testing.assert_close(graph(x)[0], (layer(x) + 1).view(-1))
        assert scripted(graph)(x)[0].equal(graph(x)[0])

    def test_others_are_left(self):
        x = torch.randn(64, 12)
        wide = nn.Linear(12, 32)

        def function(x):
            return [wide(x), x[:16].t() @ x[:16, :10]]

        graph = retraced(function, [x])
        before = targets(graph)
        narrow_transposed(graph)
        assert targets(graph) == before


class TestPrice:
    def test_of_code_on_disk_does_not_replace_that_of_making_it(self, asked):
        ask, run, state = asked
        for seconds in (30.0, 2.0):
            price.remember(run, ["lr"], state, seconds)
        assert "about 9 s of compiling" in ask()

    def test_is_new_where_the_cache_cannot_be_read(self, asked, tmp_path, monkeypatch):
        ask, run, state = asked
        price.remember(run, ["lr"], state, 5.0)
        (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
        file.write_bytes(b"\xff torn")
        assert "about 20 s" in ask()
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # No folder.
        price.remember(run, ["lr"], state, 5.0)
        assert "about 20 s" in ask()

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        """Why compiling would not pay for a training of 100 steps of 10 ms; options of it."""
        monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        data = torch.randn(20, 3), torch.randint(2, (20,))
        of = problem_from_module(lambda: nn.Linear(3, 2), F.cross_entropy, data, data, batch_size=5)
        run = Training(of, find_rule("sgd"), 100)
        cache_of(of)["seconds of a step", price._rule(run)] = 0.01
        state = run.begin(run.resolve({}).at(0), 0)

        def ask(expect=None, kind=price.REVERSE):
            return price.why_not_compile(run, ["lr"], state, {}, 0, expect, kind)

        return ask, run, state

    def test_is_weighed_against_what_is_expected(self, asked):
        ask, _, _ = asked
        # 3.5 plain steps for a step, there and back; 0.15 of 20 s / 0.15, then half of 20 s / 0.5.
        assert "3.5 s of steps are too few to pay for about 20 s of compiling" in ask()
        assert ask(133) and not ask(134)
        assert ask(39, price.FORWARD) and not ask(41, price.FORWARD)

    def test_is_weighed_against_what_was_spent(self, asked):
        ask, run, _ = asked
        price.spend(run, 129)
        assert ask()
        price.spend(run, 2)
        assert not ask()

    def test_what_another_rule_spent_or_takes_does_not_count(self, asked, monkeypatch):
        ask, run, state = asked
        price.spend(replace(run, rule=find_rule("adam")), 1e3)
        assert ask()
        del cache_of(run.problem)["seconds of a step", price._rule(run)]
        ticks = iter((0.0, 2.0, 2.0, 6.0))
        monkeypatch.setattr(price, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        values = run.resolve({}).at(0)
        assert price._step(run, state, values, 0) == price._step(run, state, values, 0) == 1.0
        nesterov = replace(run, rule=run.rule.choose(nesterov=True), values={"momentum": 0.9})
        values = nesterov.resolve({}).at(0)
        assert price._step(nesterov, state, values, 0) == 2.0

    def test_is_less_where_the_code_is_on_disk(self, asked):
        ask, run, state = asked
        price.remember(run, ["lr"], state, 5.0)  # Of which 1.5 are left.
        assert ask(9) and not ask(11)
        assert "about 20 s" in ask(1, price.FORWARD)
        assert "about 1.5 s" in ask(1)

    def test_of_tracing_is_paid_where_many_steps_are_ahead(self):
        data = torch.randn(20, 3), torch.randint(2, (20,))
        of = problem_from_module(lambda: nn.Linear(3, 2), F.cross_entropy, data, data, batch_size=5)
        run = Training(of, find_rule("sgd"), 3)
        point = run.start(["lr"])
        few, _ = Replay()(run, point, seed=0)
        assert few.note.how.endswith("by autograd: TORCH_COMPILE_DISABLE=1 is set")
        # Whatever is expected in seconds: where compiling is off, nothing asks the clock.
        unasked, _ = Replay(expect=1e4)(run, point, seed=0)
        assert unasked.note.how == few.note.how
        long = replace(run, steps=1000)
        many, eager = (Replay(compile=how)(long, point, seed=0)[0] for how in ("auto", False))
        assert many.note.how.endswith("traced: TORCH_COMPILE_DISABLE=1 is set")
        assert many.grad["lr"] == pytest.approx(float(eager.grad["lr"]), rel=1e-5)
