"""Records: one line each, whole or not at all, and nothing in them that is not JSON."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.search.provenance import _gpus, provenance
from hyperdescent.studies.engine.executors import Serial
from hyperdescent.studies.engine.record import Record, Tuned, append, key_of, plain, read

RECORD = Record(
    study="s",
    inputs={"problem": {"name": "p"}, "arm": {"name": "a", "values": {"lr": [0.1, 1e-7]}}},
    outcome=Outcome.OK,
    measures={"valid": {"loss": 0.1 + 0.2, "accuracy": None}},
    seconds=1.5,
    tuned=Tuned({"lr.knots": [0.5]}, {"width": 8}, None, Outcome.STALLED, "gradient", "why", 2.0),
    provenance=provenance(),
)


def seeded(seed):
    return replace(RECORD, inputs={**RECORD.inputs, "seed": seed})


class TestLine:
    def test_round_trip(self):
        assert Record.from_line(RECORD.line()) == RECORD
        assert isinstance(Record.from_line(RECORD.line()).tuned.outcome, Outcome)

    def test_a_failure_has_no_outcome(self):
        failed = Record("s", {}, None, error="ValueError: no")
        assert Record.from_line(failed.line()) == failed

    def test_numbers_that_json_lacks_are_refused(self):
        with pytest.raises(ValueError, match="JSON"):
            replace(RECORD, seconds=math.nan).line()

    def test_fields_of_a_later_version_are_ignored(self):
        later = json.loads(RECORD.line()) | {"energy": 3}
        assert Record.from_line(json.dumps(later)) == RECORD


class TestFile:
    def test_reads_what_was_appended(self, tmp_path):
        path = tmp_path / "records.jsonl"
        assert read(path) == []
        for seed in range(3):
            append(path, seeded(seed))
        assert read(path) == [seeded(0), seeded(1), seeded(2)]

    @pytest.mark.parametrize("cut", [1, 2, 50, 300])
    def test_a_torn_last_line_is_skipped_and_not_joined_to_the_next(self, tmp_path, cut):
        path = tmp_path / "records.jsonl"
        append(path, seeded(0))
        append(path, seeded(1))
        path.write_bytes(path.read_bytes()[:-cut])
        whole = [seeded(0), seeded(1)] if cut == 1 else [seeded(0)]
        assert read(path) == whole
        append(path, seeded(2))
        assert read(path) == [*whole, seeded(2)]

    def test_lines_of_several_writers_stay_whole(self, tmp_path):
        path = tmp_path / "records.jsonl"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: append(path, seeded(seed)), range(200)))
        assert {r.inputs["seed"] for r in read(path)} == set(range(200))

    def test_json_that_is_no_record_is_an_error_with_its_line(self, tmp_path):
        path = tmp_path / "records.jsonl"
        append(path, RECORD)
        with path.open("a") as file:
            file.write('{"loss": 1}\n')
        with pytest.raises(ValueError, match=r"records\.jsonl, line 2: not a record"):
            read(path)


def test_the_key_is_of_the_inputs_whatever_their_order():
    assert key_of({"a": 1, "b": [0.1]}) == key_of({"b": [0.1], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": {"x": 1, "new": None, "empty": {}}}) == key_of({"a": {"x": 1}})
    assert key_of({"a": 0}) != key_of({}) and key_of({"a": False}) != key_of({})
    assert RECORD.key == replace(RECORD, seconds=9.0, outcome=None).key


def test_plain_values():
    tensor = torch.tensor([[1.0, math.inf], [math.nan, 0.5]])
    assert plain({"x": tensor, 1: (True, None, "a")}) == {
        "x": [[1.0, None], [None, 0.5]],
        "1": [True, None, "a"],
    }
    with pytest.raises(TypeError, match="complex has no place in a record"):
        plain([1j])


def test_provenance_says_which_versions_made_it():
    made = Serial().map(lambda cell: provenance(), [0])[0]
    assert made["torch"] == torch.__version__
    assert made["threads"] == 1 and made["cpus"] >= 1
    assert made["time"].endswith("+00:00")
    assert not [value for value in made.values() if isinstance(value, str) and "/" in value]


def test_provenance_names_the_machine():
    made = provenance()
    assert made["cpu"] and made["memory_gib"] > 0
    assert (made["gpus"] is None) == (not torch.cuda.is_available())


def test_every_gpu_is_named_and_without_one_none_is_asked_for(monkeypatch):
    names = ["NVIDIA H100", "NVIDIA L4"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
    monkeypatch.setattr("torch.cuda.get_device_name", names.__getitem__)
    assert _gpus() == "NVIDIA H100, NVIDIA L4"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: pytest.fail("asked for a name"))
    assert _gpus() is None
