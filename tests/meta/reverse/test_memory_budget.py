"""Sizes of memory: as a user says them, as the machine has them, as a state takes them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse import memory_budget as memory
from hyperdescent.meta.reverse.checkpointing import revolve_steps
from hyperdescent.meta.reverse.memory_budget import bytes_of, comfortable, state_bytes
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.state import State
from hyperdescent.meta.training.training import Training

CPU = torch.device("cpu")
GIB = 2**30


class TestBytesOf:
    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ("2GiB", 2 * GIB),
            ("2 GiB", 2 * GIB),
            (" 2gib ", 2 * GIB),
            ("0.5GiB", GIB // 2),
            (".5GiB", GIB // 2),
            ("1.5 MiB", 3 * 2**19),
            ("3KiB", 3072),
            ("1TiB", 2**40),
            ("500 MB", 500 * 10**6),
            ("2GB", 2 * 10**9),
            ("7kb", 7000),
            ("1TB", 10**12),
            ("12B", 12),
            ("12", 12),
            ("0", 0),
            (12, 12),
            (12.9, 12),
            (1e9, 10**9),
            (0, 0),
        ],
    )
    def test_what_may_be_said(self, said, expected):
        size = bytes_of(said)
        assert size == expected and type(size) is int

    @given(st.integers(0, 2**50))
    def test_a_number_is_itself_in_every_way_to_say_it(self, count):
        assert bytes_of(count) == bytes_of(str(count)) == bytes_of(f"{count} B") == count

    @given(st.integers(0, 2**20), st.sampled_from(["KiB", "MiB", "GiB", "KB", "MB", "GB"]))
    def test_a_unit_is_a_factor(self, count, unit):
        assert bytes_of(f"{count}{unit}") == count * bytes_of(f"1{unit}")

    @pytest.mark.parametrize(
        "said", ["", "lots", "GiB", "2 gibs", "2 G", "-1GiB", "1,5GiB", "1e3", "1_000", "2GiB 3MiB"]
    )
    def test_what_is_no_size_is_named(self, said):
        with pytest.raises(ValueError, match=r"is not a size; .* such as '2GiB'") as error:
            bytes_of(said)
        assert f"memory={said!r}" in str(error.value)

    @pytest.mark.parametrize("said", [-1, -0.5, float("-inf")])
    def test_less_than_nothing_is_named(self, said):
        with pytest.raises(ValueError, match=f"memory={said:g} is below 0 bytes.*'2GiB'"):
            bytes_of(said)

    @pytest.mark.parametrize("said", ["1.2.3GiB", ".", "..MB", float("nan")])
    def test_what_is_no_number_is_named(self, said):
        with pytest.raises(ValueError, match=r"memory=.* is not a size.*'2GiB'"):
            bytes_of(said)

    def test_without_bound_is_a_size_or_named(self):
        try:
            assert bytes_of(float("inf")) > 2**60
        except ValueError as error:
            assert "memory=inf" in str(error)


class TestComfortable:
    @pytest.mark.parametrize(
        ("available", "expected"), [(1024, 256), (4 * GIB, GIB), (64 * GIB, 2 * GIB)]
    )
    def test_a_quarter_of_what_is_free_but_not_all_of_a_large_machine(
        self, monkeypatch, available, expected
    ):
        monkeypatch.setattr(memory, "available", lambda: available)
        assert comfortable(CPU) == expected

    def test_what_this_machine_has(self):
        assert 0 < comfortable(CPU) <= 2 * GIB

    def test_what_is_available_is_read(self, monkeypatch):
        told = "MemTotal: 9000 kB\nMemAvailable:    4096 kB\nSwapTotal: 1 kB\n"
        monkeypatch.setattr(Path, "read_text", lambda self: told)
        assert comfortable(CPU) == 2**20

    @pytest.mark.parametrize("told", [None, "MemTotal: 9000 kB\n"])
    def test_where_nothing_says_it(self, monkeypatch, told):
        def read(self):
            if told is None:
                raise FileNotFoundError(self)
            return told

        monkeypatch.setattr(Path, "read_text", read)
        assert comfortable(CPU) == GIB

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_quarter_of_what_is_free_on_a_gpu(self):
        free, _ = torch.cuda.mem_get_info()
        assert comfortable(torch.device("cuda")) == pytest.approx(free / 4, rel=0.1)


def test_a_state_takes_its_tensors():
    state = State(
        torch.zeros(10),
        {"m": torch.zeros(10, dtype=torch.bfloat16), "t": torch.tensor(0.0, dtype=torch.float64)},
        {"count": torch.tensor(0), "mask": torch.zeros(3, dtype=torch.bool)},
    )
    assert state_bytes(state) == 40 + 20 + 8 + 8 + 3
    assert state_bytes(State(torch.empty(0), {}, {})) == 0


class TestWhatReplayTakes:
    STEPS = 9

    @pytest.fixture
    def run(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(20, 4, generator=generator)
        data = inputs, inputs.argmax(1)
        problem = problem_from_module(
            lambda: nn.Linear(4, 4), F.cross_entropy, data, data, batch_size=10
        )
        return Training(problem, find_rule("adam"), self.STEPS)

    def state_bytes(self, run):
        return state_bytes(run.begin(run.resolve({}).at(0), 0))

    def note(self, run, **options):
        estimate, _ = Replay(compile=False, **options)(run, run.start(["lr"]), seed=0)
        assert estimate.ok
        return estimate.note

    @pytest.mark.parametrize("fit", [0, 0.5, 1, 2.5, 8.9])
    def test_no_more_states_than_fit_but_one(self, run, fit):
        note = self.note(run, memory=fit * self.state_bytes(run))
        assert note.graphs == 0
        assert note.states == max(1, int(fit))
        # But for the sweep there, the last step of which is left to the way back.
        assert note.recomputed == revolve_steps(self.STEPS, note.states) - (self.STEPS - 1)

    @pytest.mark.parametrize("graphs", ["auto", "recompute"])
    def test_all_states_where_they_just_fit(self, run, graphs):
        note = self.note(run, memory=self.STEPS * self.state_bytes(run), graphs=graphs)
        assert (note.graphs, note.states, note.recomputed) == (0, self.STEPS, 0)

    def test_graphs_in_what_is_left_over(self, run):
        kept = [self.note(run, memory=m).graphs for m in range(2_000, 60_000, 2_000)]
        assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == self.STEPS
        assert len({*kept}) > 5

    def test_the_lean_gait_keeps_no_graph_in_any_memory(self, run):
        note = self.note(run, memory="1GiB", graphs="recompute")
        assert (note.graphs, note.states, note.recomputed) == (0, self.STEPS, 0)

    def test_the_fast_gait_keeps_all_graphs_in_any_memory(self, run, monkeypatch):
        monkeypatch.setattr(memory, "available", lambda: 0)
        note = self.note(run, graphs="keep")
        assert (note.graphs, note.states, note.recomputed) == (self.STEPS, 0, 0)

    @pytest.mark.parametrize("other", [{"memory": "1GiB"}, {"checkpoints": 3}])
    def test_the_fast_gait_beside_a_budget_is_refused(self, other):
        with pytest.raises(ValueError, match="graphs='keep' keeps every graph, whatever memory="):
            Replay(graphs="keep", **other)

    @pytest.mark.parametrize("store", ["disk", "folder"])
    def test_unasked_as_many_states_as_the_disk_takes(self, run, monkeypatch, tmp_path, store):
        """And of graphs, which are not there, what is comfortable where they are."""
        free = [10**9]
        usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free[0]))
        monkeypatch.setattr(shutil, "disk_usage", usage.disk_usage)
        monkeypatch.setattr(memory, "available", lambda: 4 * 3 * self.state_bytes(run))
        where = tmp_path if store == "folder" else store
        note = self.note(run, store=where)
        assert note.states + note.graphs == self.STEPS and note.recomputed == 0
        free[0] = 4 * 2 * self.state_bytes(run)
        assert self.note(run, store=where).states == 2

    def test_unasked_what_is_comfortable(self, run, monkeypatch):
        assert self.note(run).graphs == self.STEPS
        monkeypatch.setattr(memory, "available", lambda: 4 * 3 * self.state_bytes(run))
        note = self.note(run)
        assert (note.graphs, note.states) == (0, 3)
