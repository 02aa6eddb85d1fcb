"""Serial and Ray are the same executor: one Ray for all of this file."""

import os
import textwrap

import pytest
import ray
import torch

from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.studies.engine.executors import Failure, OnRay, Serial
from hyperdescent.studies.engine.record import read
from hyperdescent.studies.engine.run import cells_of, run_study, train_cell
from hyperdescent.studies.engine.study import Study

# A problem of a user's own module; its training raises for seed 1 and ends the process for seed 2.
FRAGILE = textwrap.dedent(
    """
    import os
    from hyperdescent.studies.problems import load_problem

    class Fragile:
        def __init__(self, problem):
            self.problem = problem
        def __getattr__(self, name):
            return getattr(self.__dict__["problem"], name)
        def batch(self, step, seed):
            if seed == 1 and step == 2:
                raise RuntimeError("seed 1 is fragile")
            if seed == 2:
                os._exit(1)
            return self.problem.batch(step, seed)

    def make():
        return Fragile(load_problem("wine-mlp"))
    """
)


def study(**changes):
    plain = {
        "name": "small",
        "problems": ["wine-mlp", {"name": "digits-cnn", "options": {"width": 4}}],
        "arms": [
            {"name": "adam", "rule": "adam", "values": {"lr": 0.01}},
            {
                "name": "sgd",
                "rule": "sgd",
                "options": {"nesterov": True},
                "schedules": {"lr": "piecewise:3"},
                "values": {"lr.knots": [0.1, 0.2, 0.01], "momentum": 0.9},
            },
            {"name": "wild", "rule": "sgd", "values": {"lr": 1e30}},
        ],
        "seeds": 2,
        "steps": 6,
    }
    return Study.model_validate(plain | changes)


def fragile(*seeds):
    return study(problems=["fragile:make"], seeds=seeds, arms=[{"rule": "adam"}])


def numbers(records):
    return [(r.study, r.inputs, r.outcome, r.measures, r.tuned, r.error) for r in records]


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "fragile.py").write_text(FRAGILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        with OnRay() as executor:
            yield executor
    assert not ray.is_initialized()


class TestOnRay:
    def test_records_are_those_of_serial(self, on_ray):
        serial, parallel = run_study(study(), Serial()), run_study(study(), on_ray)
        assert numbers(serial) == numbers(parallel)
        assert len(serial) == 2 * 3 * 2 and serial.missing == 0
        outcomes = {r.inputs["arm"]["name"]: r.outcome for r in serial}
        assert outcomes == {"adam": "ok", "sgd": "ok", "wild": Outcome.DIVERGED}
        assert all(r.provenance["threads"] == 1 for r in (*serial, *parallel))

    def test_a_cell_that_raises_leaves_its_error_and_the_others(self, on_ray, tmp_path):
        serial = run_study(fragile(0, 1, 3), Serial(), out=tmp_path / "serial.jsonl")
        parallel = run_study(fragile(0, 1, 3), on_ray, out=tmp_path / "ray.jsonl")
        assert numbers(serial) == numbers(parallel)
        assert [r.outcome for r in serial] == ["ok", None, "ok"]
        assert "RuntimeError: seed 1 is fragile (fragile.py:" in serial.records[1].error
        assert len(read(tmp_path / "ray.jsonl")) == 3

    def test_a_process_that_dies_is_a_failed_cell(self, on_ray):
        records = run_study(fragile(2, 3), on_ray).records
        assert [r.outcome for r in records] == [None, "ok"]
        assert "WorkerCrashedError" in records[0].error

    def test_results_keep_the_order_of_the_cells(self, on_ray):
        ended = []

        def slow_first(cell):
            import time

            time.sleep(0.3 if cell == 0 else 0.0)
            return cell * 10

        results = on_ray.map(slow_first, range(4), lambda i, r: ended.append((i, r)))
        assert results == [0, 10, 20, 30]
        assert sorted(ended) == list(enumerate(results))

    def test_an_interrupt_gives_up_the_rest_and_ray_stays_usable(self, on_ray):
        def interrupt(index, result):
            raise KeyboardInterrupt

        def cell(seconds):
            import time

            time.sleep(seconds)

        with pytest.raises(KeyboardInterrupt):
            on_ray.map(cell, [0, 60, 60, 60, 60, 60], interrupt)
        assert on_ray.map(lambda cell: cell + 1, [1]) == [2]

    def test_a_ray_that_runs_already_is_used_and_left_running(self, on_ray):
        with OnRay() as other:
            assert other.map(lambda cell: -cell, [1, 2]) == [-1, -2]
        assert ray.is_initialized()

    def test_cells_larger_than_the_machine_are_refused(self, on_ray):
        with pytest.raises(ValueError, match=r"cpus_per_cell=1e\+06 .* no cell would ever start"):
            OnRay(cpus_per_cell=1e6).map(train_cell, [])


class TestSerial:
    def test_threads_are_one_inside_and_as_before_outside(self):
        before = torch.get_num_threads()
        assert Serial().map(lambda cell: torch.get_num_threads(), [0]) == [1]
        assert torch.get_num_threads() == before

    def test_where_a_cell_failed(self):
        def cell(divisor):
            return 1 / divisor

        (failure, one) = Serial().map(cell, [0, 1])
        assert isinstance(failure, Failure) and one == 1.0
        assert failure.error == "ZeroDivisionError: division by zero"
        assert failure.where.startswith("test_executors.py:") and failure.where.endswith(" in cell")

    def test_one_cell_is_the_same_in_any_order(self):
        cells = cells_of(study())
        alone = Serial().map(train_cell, cells[-3:-2])
        after_others = Serial().map(train_cell, cells[:-2])[-1:]
        assert numbers(alone) == numbers(after_others)
