"""The benchmark itself: what it measures, what it leaves out, and what it writes. Nothing is timed
against a bound.
"""

import gc
import json
import math
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.training import Training
from hyperdescent.scripts import command
from hyperdescent.studies import data_files as files
from hyperdescent.studies.benchmarks import metagradient as bench
from hyperdescent.studies.benchmarks import metagradient_report as bench_report
from hyperdescent.studies.benchmarks import workloads
from hyperdescent.studies.benchmarks.bfloat16 import bench_bfloat16
from hyperdescent.studies.benchmarks.metagradient import (
    PLAIN,
    Difference,
    Grown,
    RouteRow,
    WorkloadResult,
    bench_metagradient,
)
from hyperdescent.studies.benchmarks.metagradient_peers import PEERS, Answer, Peer
from hyperdescent.studies.benchmarks.workloads import SEED, WORKLOADS, perceptron
from hyperdescent.studies.measure.device import find_device
from hyperdescent.studies.measure.memory_meter import Meter

HAND = "unrolled by hand"
TINY = replace(WORKLOADS["w1-sgd"], name="tiny", model=partial(perceptron, 4), steps=3, judged=3)
ABSENT = Peer("absent", lambda workload, problem: None, "a note", "no_such_package")


@pytest.fixture
def quick(monkeypatch):
    """Two peers, one of them not installed, and memory in this process."""
    gc.freeze()  # Every measurement collects first, and there is more by now than at the start.
    few = {HAND: PEERS[HAND], "absent": ABSENT}
    monkeypatch.setattr(bench, "PEERS", few)
    monkeypatch.setattr(bench_report, "PEERS", few)
    monkeypatch.setattr(workloads, "WORKLOADS", {"tiny": TINY, "w4": WORKLOADS["w4"]})
    monkeypatch.delenv(files.DATA, raising=False)

    def grown(workload, name, say):
        missing = few[name].missing if name in few else ""
        return Grown(None, left_out=missing) if missing else bench.memory_of(workload, name, 1e4)

    monkeypatch.setattr(bench, "_grown", grown)
    # Compiling each of them on three steps would be minutes of what other tests are for.
    slow = bench.OURS.items()
    ours = {name: partial(made.func, **made.keywords | {"compile": False}) for name, made in slow}
    monkeypatch.setattr(bench, "OURS", ours)


class TestResult:
    def test_has_every_quantity_of_every_method(self, quick):
        told = []
        (result,) = bench_metagradient([TINY], repeats=2, say=told.append)
        assert result.workload == "tiny" and len(result.seconds) == 2 and result.mib >= 0
        rows = {row.method: row for row in result.rows}
        assert list(rows) == [*bench.OURS, HAND, "absent"]
        for name in (*bench.OURS, HAND):
            assert len(rows[name].ratios) == 2 and min(rows[name].ratios) > 0
            assert rows[name].mib >= 0 and not rows[name].left_out
            assert ("by autograd" in rows[name].how) is (name != HAND)
            for hyper in ("lr", "momentum"):
                assert result.error(rows[name], hyper) < 1e-6
        assert "not installed" in rows["absent"].left_out
        assert (rows["absent"].ratios, rows["absent"].mib, rows["absent"].slopes) == ([], None, {})
        assert any("time, round 0 of 2" in line for line in told)
        assert json.loads(json.dumps(asdict(result)))["steps"] == 3

    def test_one_that_fails_gives_its_reason(self, quick, monkeypatch):
        def fail(workload, problem):
            raise RuntimeError("no luck\nat all")

        monkeypatch.setitem(bench.PEERS, "absent", Peer("absent", fail, "a note"))
        (result,) = bench_metagradient([TINY], repeats=1)
        assert result.rows[-1].left_out == "RuntimeError: no luck"
        assert result.rows[0].ratios and not result.rows[-1].ratios

    def test_a_missing_text_leaves_out_the_workload(self, quick):
        (result,) = bench_metagradient([WORKLOADS["w4"]], repeats=1)
        assert "HYPERDESCENT_DATA is not set: put" in result.left_out and not result.rows
        (told,) = bench_report.remarks(result)
        assert told.startswith("w4 is left out: tinyshakespeare.txt is needed")

    def test_no_rounds_are_refused(self):
        with pytest.raises(ValueError, match="repeats=0 measures nothing"):
            bench_metagradient([TINY], repeats=0)


def test_a_large_workload_is_run_once_and_says_what_it_kept(quick, monkeypatch):
    lean = {"lean": partial(Replay, compile=False, graphs="recompute", checkpoints=2)}
    monkeypatch.setattr(bench, "LARGE", lean)
    monkeypatch.setattr(bench_report, "LARGE", lean)
    (result,) = bench_metagradient([replace(TINY, large=True, judged=0)], repeats=3)
    (row,) = result.rows
    assert len(result.seconds) == len(row.ratios) == 1 and min(row.ratios) > 0
    assert not result.truth and not row.slopes and row.mib >= 0
    assert bench_report.remarks(result) == ["tiny, lean: checkpoints 2, by autograd"]
    text = bench_report.section(result, "the command")
    assert "finite differences" not in text and "Errors" not in text


class TestDevice:
    def test_is_found_by_name(self):
        assert find_device("cpu") == torch.device("cpu")

    def test_one_that_is_not_here_is_told(self):
        absent = [] if torch.cuda.is_available() else ["cuda"]
        for name in ["nowhere", *absent]:
            with pytest.raises(ValueError, match=f"device='{name}' cannot be used here: "):
                find_device(name)

    def test_a_gpu_is_named_beside_its_results(self, tmp_path):
        gpu = replace(RESULT, gpu="Some GPU")
        text = bench_report.section(gpu, "the command")
        assert "### w9 on Some GPU" in text and "on one Some GPU, driven by " in text
        file = tmp_path / "B.md"
        for result in (RESULT, gpu):
            bench_report.write(file, result, "the command")
        assert file.read_text().count("### w9") == 2


def test_gpt2_has_its_weights():
    with torch.device("meta"):
        model = WORKLOADS["gpt2"].model()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_finite_differences_are_as_good_as_they_say():
    found = bench.finite_differences(TINY)
    problem = TINY.problem(torch.float64)
    training = Training(problem, find_rule("sgd"), TINY.steps, values=TINY.values)
    estimate, _ = Replay()(training, training.start(TINY.values), None, seed=SEED)
    for name, (slope, doubt) in found.items():
        assert abs(slope / float(estimate.grad[name]) - 1) < doubt < 1e-6


class TestLow:
    def test_bfloat16_is_seen_beside_float32(self):
        (trust,) = bench_bfloat16([TINY], rates=[1e-2], steps=[5], seeds=2)
        assert (trust.workload, trust.lr, trust.steps) == ("tiny", 1e-2, 5)
        # Not the same, and not unlike.
        assert all(0.9 < cosine < 1 + 1e-6 for cosine in trust.cosines)
        assert all(1e-5 < error < 0.5 for error in trust.errors)

    def test_is_kept_as_a_table(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(workloads, "WORKLOADS", {"tiny": TINY})
        file = tmp_path / "B.md"
        said = ["hyperdescent", "bench", "bfloat16", "--only", "tiny", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", [*said, "--out", str(file)])
        try:
            command.main()
        except SystemExit as done:
            assert not done.code
        text = file.read_text()
        assert (
            "| tiny | 0.01 | 20 | " in text and "`hyperdescent bench bfloat16 --only tiny" in text
        )
        assert "Metagradients through bfloat16" in capsys.readouterr().out


class TestMemory:
    def test_the_meter_sees_what_is_freed_again(self):
        meter = Meter()
        torch.ones(2**24)  # 64 MiB
        assert 60 < meter.mib < 100

    @pytest.fixture
    def heavy(self, monkeypatch):
        """A method of four MiB a step: what a process that ran other tests takes again after its
        freed memory was given back, up to 20 MiB, is little beside it.
        """

        def hold(workload):
            return Answer(float(torch.ones(workload.steps, 2**20).sum()), {})

        monkeypatch.setattr(bench, "find_method", lambda name, workload, problem: hold)
        return replace(TINY, steps=200)

    def test_a_method_is_measured_whole(self, heavy):
        grown = bench.memory_of(heavy, HAND, free=4000)
        assert grown.mib == pytest.approx(800, rel=0.1) and not grown.left_out

    def test_one_that_would_not_fit_is_not_run(self, heavy):
        grown = bench.memory_of(heavy, HAND, free=400)
        assert grown.mib is None
        assert "it would take about 0.8 GiB (by its growth over 20 steps)" in grown.left_out
        # This project's routes bound their memory, so what they take early says nothing.
        assert bench.memory_of(heavy, "fast", free=400).mib > 400

    def test_it_has_a_process_of_its_own(self):
        told = []
        grown = bench._grown(TINY, PLAIN, told.append)
        assert grown.mib >= 0 and not grown.left_out
        assert told == ["tiny: memory, plain training"]


RESULT = WorkloadResult(
    *("w9", "a model", "adam", 1000, 100),
    seconds=[0.5, 0.25, 0.75],
    mib=2.0,
    truth={"lr": Difference(2.0, 1e-10), "beta1": Difference(-4.0, 1e-9)},
    rows=[
        RouteRow("fast", [2.0, 3.0, 2.5], 100.4, {"lr": 2.0, "beta1": -4.0004}),
        RouteRow("one", [1.0, 1.0, 1.0], 9.96, {"lr": math.nan}),
        RouteRow("two", left_out="it would take 99 GiB"),
        RouteRow("three", [1.5], how="3 states kept, by autograd: it is wrong"),
    ],
)


class TestTables:
    def test_markdown_has_a_row_per_method(self):
        text = bench_report.section(RESULT, "the command")
        for line in (
            "### w9",
            "| method | time / plain | MiB | error lr | error beta1 |",
            "| plain training | 0.500 (0.250-0.750) s | 2.0 |  |  |",
            "| **fast** | 2.50 (2.00-3.00) | 100 | 0.0e+00 | 1.0e-04 |",
            "| one | 1.00 (1.00-1.00) | 10.0 | NaN | refused |",
            "| two | left out | - | - | - |",
            "| finite differences are sure to |  |  | 1.0e-10 | 1.0e-09 |",
            "- w9, two: it would take 99 GiB.",
            "| three | 1.50 (1.50-1.50) | - | - | - |",
            "- w9, three: by autograd: it is wrong.",
            "Errors after 100 steps. Medians (lowest-highest) of 3 rounds.",
        ):
            assert line in text.splitlines(), line
        assert "a model; adam, 1,000 steps. Made 2" in text
        assert "`the command`" in text and f"torch {torch.__version__}" in text

    def test_a_left_out_workload_has_a_sentence_and_no_table(self):
        text = bench_report.section(replace(RESULT, left_out="no data", rows=()), "the command")
        assert "- w9 is left out: no data." in text and "|" not in text

    def test_a_system_that_cannot_clear_its_peak_is_named(self):
        text = bench_report.section(replace(RESULT, exact_memory=False), "the command")
        assert "upper bounds" in text
        assert "upper bounds" not in bench_report.section(RESULT, "the command")

    def test_workloads_are_kept_apart_in_a_file(self, tmp_path):
        file = tmp_path / "B.md"
        bench_report.write(file, RESULT, "first")
        bench_report.write(file, replace(RESULT, workload="w8"), "second")
        bench_report.write(file, RESULT, "third")
        text = file.read_text()
        assert text.count("## One exact metagradient") == 1
        assert text.index("### w9") < text.index("### w8") and text.count("### w9") == 1
        assert "`third`" in text and "`second`" in text and "`first`" not in text
        assert all(f"- {name}: " in text for name in PEERS)

    def test_the_section_is_replaced_and_the_rest_kept(self, tmp_path):
        file = tmp_path / "B.md"
        bench_report.write_section(file, "first", "metagradient")
        assert file.read_text().startswith("# Benchmarks\n\n<!-- bench: metagradient -->\nfirst\n")
        other = "<!-- bench: other -->\nstays\n<!-- /bench -->\n"
        file.write_text(f"# Mine\n\n{file.read_text()}after\n{other}")
        before = file.read_text()
        bench_report.write_section(file, "second\nline", "metagradient")
        assert file.read_text() == before.replace("first", "second\nline")

    def test_a_section_without_its_end_is_refused(self, tmp_path):
        file = tmp_path / "B.md"
        file.write_text("<!-- bench: metagradient -->\nmine")
        with pytest.raises(ValueError, match=r"B\.md has .* without <!-- /bench --> after it"):
            bench_report.write_section(file, "text", "metagradient")
        assert file.read_text().endswith("mine")


class TestCommand:
    def call(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["hyperdescent", "bench", *arguments])
        try:
            command.main()
        except SystemExit as done:
            return done.code or 0
        return 0

    def test_it_shows_and_keeps_a_table(self, quick, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)
        wanted = ["metagradient", "--only", "tiny,w4", "--repeats", "1", "--out"]
        assert self.call(monkeypatch, *wanted, str(tmp_path / "B.md")) == 0
        told = capsys.readouterr().out
        for part in ("fast", HAND, "absent: no_such_package is not", "error momentum", "kept in"):
            assert part in told
        assert "w4 is left out" in told
        text = (tmp_path / "B.md").read_text()
        assert "`hyperdescent bench metagradient --only tiny --repeats 1 --out B.md`" in text
        assert str(tmp_path) not in text

    def test_an_unknown_workload_is_one_line(self, monkeypatch, capsys):
        assert self.call(monkeypatch, "metagradient", "--only", "w7") == 2
        told = capsys.readouterr().err
        assert told.startswith("error: there is no workload 'w7'") and told.count("\n") == 1
        assert all(name in told for name in WORKLOADS)
