"""The benchmark of implicit hypergradients: every method against the whole Hessian in float64, what
it measures, leaves out and writes. Nothing is timed against a bound.
"""

import gc
import json
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn

from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.scripts import command
from hyperdescent.studies.benchmarks import implicit as implicit_bench
from hyperdescent.studies.benchmarks import implicit_cases, implicit_report
from hyperdescent.studies.benchmarks.implicit import (
    OURS,
    PLAIN,
    ImplicitResult,
    SolveRow,
    bench_implicit,
    exact,
    find_way,
    memory_at,
    reach,
)
from hyperdescent.studies.benchmarks.implicit_cases import CASES, Case, find_cases
from hyperdescent.studies.benchmarks.implicit_peers import (
    IMPLICIT_PEERS,
    SOLVERS,
    ImplicitPeer,
    Optimum,
)

DOUBLE = torch.float64
HAND = "by hand"
ABSENT = ImplicitPeer("absent", lambda optimum, solver: None, "a note", "no_such_package")
PRESENT = [name for name, peer in IMPLICIT_PEERS.items() if not peer.missing]
METHODS = [*OURS, *PRESENT]
# Those with code of their own: what is compiled is what "no compiler" runs.
APART = [name for name in METHODS if name != "compiled"]


def tiny_net():
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))


@pytest.fixture(scope="module")
def optimum():
    """15 weights near, not at, an optimum: penalties apart, so that an order mixed up shows."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_net().double()
    x, y = (torch.randn(30, 2, dtype=DOUBLE, generator=draw) for _ in range(2))
    targets = [(each.sum(1) > 0).long() + (each[:, 0] > 1).long() for each in (x, y)]
    penalties = [
        0.3 + 0.3 * torch.rand(w.shape, dtype=DOUBLE, generator=draw) for w in model.parameters()
    ]
    return Optimum(model, penalties, (x, targets[0]), (y, targets[1]), 15, 1.0)


@pytest.fixture(scope="module")
def system(optimum):
    """(Hessian, held-out gradient, weights) as dense tensors."""
    gradient, held_out = implicit_bench._gradients(optimum)
    rows = [
        torch.cat([x.flatten() for x in torch.autograd.grad(row, optimum.weights, retain_graph=1)])
        for row in gradient
    ]
    weights = torch.cat([w.detach().flatten() for w in optimum.weights])
    return torch.stack(rows), held_out, weights


def answer_of(way, optimum, products):
    found = find_way(way, replace(optimum, products=products))()
    return torch.cat([x.detach().flatten() for x in found])


def series(system, step_size, products):
    hessian, b, weights = system
    x = term = b
    for _ in range(products):
        term = term - step_size * hessian @ term
        x = x + term
    return -weights * step_size * x


def krylov(system, products):
    """What conjugate gradients find: the least error in the Hessian's norm over b, Ab, A^2 b..."""
    hessian, b, weights = system
    columns = [b / b.norm()]
    for _ in range(products - 1):
        columns.append(hessian @ columns[-1] / (hessian @ columns[-1]).norm())
    basis = torch.linalg.qr(torch.stack(columns, 1))[0]
    return -weights * (basis @ torch.linalg.solve(basis.T @ hessian @ basis, basis.T @ b))


class TestExactness:
    def test_the_reference_is_the_whole_hessian(self, optimum, system):
        hessian, b, weights = system
        assert torch.allclose(hessian, hessian.T, atol=1e-12)
        assert torch.linalg.eigvalsh(hessian)[0] > 0.05
        expected = -weights * torch.linalg.solve(hessian, b)
        torch.testing.assert_close(exact(optimum), expected, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("method", METHODS)
    def test_enough_products_of_conjugate_gradients_are_exact(self, method, optimum):
        off = answer_of(("CG", method), optimum, 25) - exact(optimum)
        # Betty's goes on from another residual than conjugate gradients do.
        wrong = float(off.norm() / exact(optimum).norm())
        assert wrong > 0.01 if method == "betty" else wrong < 1e-9

    @pytest.mark.parametrize("method", METHODS)
    def test_enough_terms_of_neumanns_series_are_exact(self, method, optimum):
        off = answer_of(("Neumann", method), optimum, 400) - exact(optimum)
        assert float(off.norm() / exact(optimum).norm()) < 1e-9


class TestProducts:
    @pytest.mark.parametrize("method", APART)
    def test_a_series_has_as_many_terms_as_products(self, method, optimum, system):
        for products in (1, 4):
            found = answer_of(("Neumann", method), optimum, products)
            torch.testing.assert_close(found, series(system, 1.0, products), rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("method", [name for name in APART if name != "betty"])
    def test_conjugate_gradients_make_as_many_steps_as_products(self, method, optimum, system):
        for products in (1, 4):
            found = answer_of(("CG", method), optimum, products)
            torch.testing.assert_close(found, krylov(system, products), rtol=1e-9, atol=1e-12)


def test_plain_training_makes_as_many_steps_and_moves_nothing(optimum, monkeypatch):
    steps = []
    step = torch.optim.SGD.step

    def counted(self, *inputs):
        steps.append(0)
        return step(self, *inputs)

    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    before = [w.detach().clone() for w in optimum.weights]
    find_way(None, optimum)()
    assert len(steps) == optimum.products
    assert all(map(torch.equal, before, optimum.weights))
    assert all(w.grad is None for w in optimum.weights)


TINY = Case("tiny", "a model", tiny_net, tiny_net, 0.5, 30, products=15)


@pytest.fixture
def quick(monkeypatch):
    """One route, two peers, one of them not installed, little data, memory in this process."""
    few = {HAND: IMPLICIT_PEERS[HAND], "absent": ABSENT}
    for module in (implicit_bench, implicit_report):
        monkeypatch.setattr(module, "IMPLICIT_PEERS", few)
        monkeypatch.setattr(module, "OURS", {"by autograd": partial(Implicit, compile=False)})
    (train, valid) = implicit_bench.digits()
    cut = ((train[0][:40, 20:22], train[1][:40] % 3), (valid[0][:40, 20:22], valid[1][:40] % 3))
    monkeypatch.setattr(implicit_bench, "digits", lambda: cut)
    monkeypatch.setattr(implicit_bench, "run_isolated", lambda measure, *inputs: measure(*inputs))
    monkeypatch.setattr(implicit_cases, "CASES", {"tiny": TINY})
    # Of all that other tests left behind: seconds, and only memory would show it.
    monkeypatch.setattr(gc, "collect", lambda: 0)


class TestResult:
    def test_has_every_quantity_of_every_method(self, quick):
        told = []
        (result,) = bench_implicit([TINY], repeats=2, say=told.append)
        assert len(result.seconds) == 2 and result.mib >= 0 and result.products == 15
        rows = {(row.solver, row.method): row for row in result.rows}
        assert list(rows) == [(s, m) for s in SOLVERS for m in ("by autograd", HAND, "absent")]
        for (solver, method), row in rows.items():
            if method == "absent":
                assert row.left_out.startswith("no_such_package is not installed; pip install no_")
                assert (row.ratios, row.mib, row.error, row.cosine) == ([], None, None, None)
            else:
                assert len(row.ratios) == 2 and min(row.ratios) > 0 and row.mib >= 0
                assert not row.left_out and row.cosine > 0.9
                assert row.error < (1e-6 if solver == "CG" else 1)
        assert "tiny: time, round 0 of 2, CG, by hand" in told
        assert json.loads(json.dumps(asdict(result)))["case"] == "tiny"

    def test_one_that_fails_gives_its_reason(self, quick, monkeypatch):
        def fail(optimum, solver):
            raise RuntimeError("no luck\nat all")

        monkeypatch.setitem(implicit_bench.IMPLICIT_PEERS, HAND, ImplicitPeer(HAND, fail, "a note"))
        (result,) = bench_implicit([TINY], repeats=1)
        row = result.rows[1]
        assert (row.method, row.left_out, row.ratios) == (HAND, "RuntimeError: no luck", [])
        assert result.ahead("CG") is None

    def test_errors_can_be_left_out(self, quick):
        (result,) = bench_implicit([replace(TINY, small=None)], repeats=1)
        assert all(row.error is None and row.cosine is None for row in result.rows)
        assert result.rows[0].ratios

    def test_no_rounds_are_refused(self):
        with pytest.raises(ValueError, match="repeats=0 measures nothing"):
            bench_implicit([TINY], repeats=0)


def test_training_leads_to_an_optimum_where_the_series_converges(quick):
    reached = reach(TINY, tiny_net, DOUBLE)
    gradient, _ = implicit_bench._gradients(reached)
    assert gradient.norm() < 1e-6
    rows = [torch.autograd.grad(g, reached.weights, retain_graph=True) for g in gradient]
    hessian = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    spectrum = torch.linalg.eigvalsh(hessian)
    assert spectrum[0] > 0 and 0.5 < reached.step_size * spectrum[-1] < 2


def test_memory_is_measured_in_a_process_of_its_own(optimum):
    grown = implicit_bench._grown(optimum, ("CG", HAND), lambda told: None)
    assert not grown.left_out and 0 <= grown.mib < 100
    assert memory_at(optimum, None).mib >= 0


def test_cases_by_name():
    assert [case.name for case in find_cases(["mlp", "softmax", "mlp"])] == ["mlp", "softmax"]
    assert [case.name for case in find_cases([])] == list(CASES)
    with pytest.raises(ValueError, match=r"no case 'mpl'; did you mean 'mlp'\?"):
        find_cases(["mpl"])
    for case in CASES.values():
        count = f"{sum(p.numel() for p in case.model().parameters()):,}"
        assert f"{count} weights" in case.what


RESULT = ImplicitResult(
    *("w9", "a model", 20, 0.25),
    seconds=[0.5, 0.25, 0.75],
    mib=2.0,
    rows=[
        SolveRow("CG", "compiled", [2.0, 3.0, 2.5], 100.4, 1.5e-5, 0.99999),
        SolveRow("CG", HAND, [4.0, 4.5, 5.0], 9.96, 0.123, -0.5),
        SolveRow("Neumann", "compiled", [1.5], 1.0),
        SolveRow("Neumann", "torchopt", left_out="it is absent"),
    ],
)


class TestTables:
    def test_markdown_shows_what_was_measured(self):
        text = implicit_report.section(RESULT, "the command")
        for line in (
            "### w9",
            "| solver | method | time / plain | MiB | error | cosine |",
            f"|  | {PLAIN} | 0.500 (0.250-0.750) s | 2.0 |  |  |",
            "| CG | **compiled** | 2.50 (2.00-3.00) | 100 | 1.5e-05 | 1.0000 |",
            f"| CG | {HAND} | 4.50 (4.00-5.00) | 10.0 | 0.12 | -0.5000 |",
            "| Neumann | **compiled** | 1.50 (1.50-1.50) | 1.0 | - | - |",
            "| Neumann | torchopt | left out | - | - | - |",
            "- w9, torchopt, Neumann: it is absent.",
            "- w9, CG: the fastest peer, by hand, takes 2.00 (1.50-2.00) times as long as the "
            "fastest of ours.",
            "Medians (lowest-highest) of 3 rounds.",
        ):
            assert line in text.splitlines(), line
        assert "a model; 20 products, step size 0.25. Made 2" in text and "`the command`" in text

    def test_a_system_without_exact_memory_says_so(self):
        text = implicit_report.section(replace(RESULT, exact_memory=False), "the command")
        assert "cannot clear its record of the peak: read small MiB as upper bounds." in text

    def test_the_file_has_the_notes_once_and_a_section_per_case(self, tmp_path):
        file = tmp_path / "B.md"
        for result, said in ((RESULT, "first"), (replace(RESULT, case="w8"), "second")):
            implicit_report.write(file, result, said)
        implicit_report.write(file, RESULT, "third")
        text = file.read_text()
        assert text.count("## One implicit hypergradient") == 1
        assert text.index("### w9") < text.index("### w8") and text.count("### w9") == 1
        assert "`third`" in text and "`second`" in text and "`first`" not in text
        assert all(f"- {name}: " in text for name in IMPLICIT_PEERS)


def test_the_command_shows_and_keeps_a_table(quick, monkeypatch, capsys, tmp_path):
    file = tmp_path / "B.md"
    said = ["hyperdescent", "bench", "implicit", "--repeats", "1", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", said)
    with pytest.raises(SystemExit) as done:
        command.main()
    assert not done.value.code
    told = capsys.readouterr().out
    for part in ("by autograd", HAND, "no_such_package is not installed", "the fastest peer"):
        assert part in told
    text = file.read_text()
    assert "`hyperdescent bench implicit --only tiny --repeats 1 --out B.md`" in text
    assert str(tmp_path) not in text
