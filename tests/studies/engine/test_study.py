"""Studies: YAML there and back, errors that say where, and runs that go on where they stopped."""

import json
from types import SimpleNamespace

import pytest

from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.studies.engine.executors import Serial
from hyperdescent.studies.engine.record import Record, read
from hyperdescent.studies.engine.run import cells_of, run_study
from hyperdescent.studies.engine.study import Arm, Study, read_study, study_from_yaml

TEXT = """
name: rates
problems: [wine-mlp, {name: wine-mlp, options: {width: 8, split: 1}}]
arms:
  - {rule: adam, values: {lr: 1e-2}}
  - name: knots
    rule: sgd
    options: {nesterov: true}
    schedules: {lr: "piecewise:3"}
    values: {lr.knots: [0.1, 0.2, 0.01], momentum: 0.9}
seeds: 2
steps: 5
"""
STUDY = study_from_yaml(TEXT)


def refused(old, new):
    assert old in TEXT
    with pytest.raises(ValueError) as raised:
        study_from_yaml(TEXT.replace(old, new), "study.yaml")
    return str(raised.value)


class TestYaml:
    def test_reads_as_meant(self):
        assert STUDY.seeds == (0, 1)
        assert STUDY.arms[0].name == "adam" and STUDY.arms[0].values == {"lr": 0.01}
        assert STUDY.arms[1].options == {"nesterov": True}
        assert [p.label for p in STUDY.problems] == ["wine-mlp", "wine-mlp(width=8, split=1)"]

    def test_round_trip(self, tmp_path):
        path = tmp_path / "study.yaml"
        path.write_text(STUDY.to_yaml())
        assert read_study(path) == STUDY
        assert read_study(path).to_yaml() == STUDY.to_yaml()

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("rule: adam", "rule: adm", "arms[0].rule: there is no rule 'adm'; did you mean"),
            ("nesterov: true", "nestrov: true", "arms[1].options: sgd has no option 'nestrov'"),
            ("piecewise:3", "piecewis:3", "arms[1].schedules: there is no schedule 'piecewis'"),
            ("[wine-mlp,", "[wine-mpl,", "problems[0].name: there is no problem 'wine-mpl'; did"),
            ("1e-2", "fast", "arms[0].values.lr: 'fast' is not a finite number or a list"),
            ("1e-2", ".nan", "arms[0].values.lr: nan is not a finite number"),
            ("1e-2", "true", "arms[0].values.lr: True is not a finite number"),
            ("steps: 5", "step: 5", "there is no field 'step'; did you mean 'steps'?"),
            ("steps: 5", "", "study.yaml: steps is missing"),
            ("steps: 5", "steps: 0", "steps: Input should be greater than or equal to 1"),
            ("seeds: 2", "seeds: 0", "seeds: "),
            ("seeds: 2", "seeds: [1, 1]", "seed 1 is there twice"),
            ("name: knots", "name: adam", "arm adam is there twice"),
            ("name: knots", "nam: knots", "arms[1]: there is no field 'nam'; did you mean 'name'"),
            ("name: knots", "learn: [lr]\n    budget: 3x", "arms[1].budget: budget='3x' is not a"),
            ("name: knots", "budget: 3", "arms[1]: route and budget are for tuning; say what"),
            ("momentum: 0.9", "momentum: [[1], 2]", "arms[1].values.momentum: [[1], 2] is not a"),
            ("momentum: 0.9", "momentum: [[1, 2], [3]]", "[[1, 2], [3]] is not a table; its rows"),
            ("momentum: 0.9", "momentum: [[[1]]]", "[1] is not a finite number"),
            ("  - {rule: adam, values: {lr: 1e-2}}", "  - {", "study.yaml is not YAML: "),
        ],
    )
    def test_errors_say_where_and_what(self, old, new, message):
        assert message in refused(old, new)

    def test_every_error_is_told_at_once(self):
        lines = refused("seeds: 2\nsteps: 5", "sedes: 2\nsteps: 0").splitlines()
        assert len(lines) == 2 and all(line.startswith("study.yaml: ") for line in lines)

    def test_an_item_that_is_wrong_is_not_also_missing(self):
        lines = refused("problems: [wine-mlp, ", "problems: [wine-mpl, ").splitlines()
        assert len(lines) == 1 and "problems[0].name: there is no problem" in lines[0]
        text = "{name: s, problems: [wine-mlp], steps: 1, arms: %s}"
        for arms, told in (("[{rule: adm}]", "there is no rule"), ("[]", "at least 1 item")):
            with pytest.raises(ValueError) as raised:
                study_from_yaml(text % arms)
            assert told in str(raised.value) and "\n" not in str(raised.value)

    def test_a_file_that_is_no_mapping(self):
        with pytest.raises(ValueError, match="must be a mapping with name, problems"):
            study_from_yaml("- 3")


class TestRun:
    def test_cells_are_problems_then_arms_then_seeds(self):
        order = [(c.problem.label, c.arm.name, c.seed) for c in cells_of(STUDY)]
        assert order[:4] == [("wine-mlp", arm, s) for arm in ("adam", "knots") for s in (0, 1)]
        records = run_study(STUDY)
        assert [r.inputs for r in records] == [c.inputs for c in cells_of(STUDY)]

    def test_a_record_holds_numbers_for_valid_and_test(self, tmp_path):
        (record, *_) = run_study(STUDY, out=tmp_path / "new" / "out.jsonl")
        assert set(record.measures) == {"valid", "test"}
        assert set(record.measures["test"]) == {"loss", "accuracy"}
        assert record.outcome is Outcome.OK and record.seconds > 0 and record.tuned is None
        assert read(tmp_path / "new" / "out.jsonl")[0] == record

    def test_divergence_is_an_outcome_and_null_in_json(self, tmp_path):
        wild = {"rule": "sgd", "values": {"lr": 1e30}}
        run_study(
            STUDY.model_copy(update={"arms": (STUDY.arms[0].model_validate(wild),)}),
            out=tmp_path / "o",
        )
        for line in (tmp_path / "o").read_text().splitlines():
            content = json.loads(line, parse_constant=lambda name: pytest.fail(name))
            assert content["outcome"] == "diverged"
            assert content["measures"]["valid"] == {"loss": None}

    def test_a_second_run_does_only_what_is_not_on_record(self, tmp_path):
        out, seen = tmp_path / "out.jsonl", []
        first = run_study(STUDY, out=out)
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:5]) + lines[5][:40])
        second = run_study(STUDY, out=out, progress=seen.append)
        assert len(seen) == 3 and second.records[:5] == first.records[:5]
        assert run_study(STUDY, out=out, progress=lambda record: pytest.fail("ran again")) == second
        more = STUDY.model_copy(update={"seeds": (0, 1, 2)})
        seen.clear()
        run_study(more, out=out, progress=seen.append)
        assert {r.inputs["seed"] for r in seen} == {2}

    def test_a_failed_cell_is_tried_again(self, tmp_path, monkeypatch):
        out = tmp_path / "out.jsonl"
        monkeypatch.setattr("hyperdescent.studies.engine.run.train_cell", lambda cell: 1 / 0)
        broken = run_study(STUDY, out=out)
        assert all(r.outcome is None and r.error.startswith("ZeroDivisionError") for r in broken)
        monkeypatch.undo()
        assert all(r.outcome is Outcome.OK for r in run_study(STUDY, out=out))

    def test_an_interrupt_keeps_what_finished(self, tmp_path):
        seen = []

        def interrupt(record):
            seen.append(record)
            if len(seen) == 3:
                raise KeyboardInterrupt

        records = run_study(STUDY, out=tmp_path / "out.jsonl", progress=interrupt)
        assert len(records) == 3 and records.missing == 5
        assert read(tmp_path / "out.jsonl") == list(records)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"values": {"beta1": 0.5}}, "arm 'knots' on wine-mlp: sgd on wine-mlp has no hyper"),
            ({"values": {"lr": -1.0}}, "lr=-1 is outside"),
            ({"learn": ("rl",)}, "has no hyper 'rl'"),
            (
                {"learn": ("nesterov",), "route": "gradient", "values": {"momentum": 0.9}},
                "route='gradient' cannot learn",
            ),
            ({"learn": ("lr",), "route": "downhill"}, "downhill"),
            ({"options": {"nesterov": True}}, "nesterov=True needs momentum"),
            ({"schedules": {"rate": "cosine"}}, "has no hyper 'rate'"),
        ],
    )
    def test_what_cannot_begin_is_refused_before_anything_runs(self, changes, message):
        plain = {"options": {}, "schedules": {}, "values": {}}
        arm = STUDY.arms[1].model_copy(update={**plain, **changes})
        study = STUDY.model_copy(update={"arms": (STUDY.arms[0], arm)})
        with pytest.raises(ValueError, match=message):
            run_study(study, progress=lambda record: pytest.fail("something ran"))

    def test_a_second_run_on_a_folder_in_use_is_refused(self, tmp_path):
        out, refused = tmp_path / "out.jsonl", []

        def again(record):
            with pytest.raises(BlockingIOError, match="in use by another run"):
                run_study(STUDY, out=out)
            refused.append(record)

        assert list(run_study(STUDY, out=out, progress=again)) == refused == read(out)

    def test_two_places_to_run_are_one_too_many(self):
        with pytest.raises(ValueError, match="not both"):
            run_study(STUDY, Serial(), address="local")

    @pytest.mark.parametrize("learn", [["lr", "l2"], ["lr", "nesterov"]])
    def test_a_tuned_arm_trains_with_what_tune_found(self, learn):
        arm = {"rule": "sgd", "learn": learn, "budget": "1s", "values": {"momentum": 0.9}}
        study = Study(name="t", problems=["breast-cancer-logistic"], arms=[arm], steps=5)
        (found,) = run_study(study)
        assert found.tuned.outcome is Outcome.OK
        assert {*found.tuned.hypers, *found.tuned.options} == set(learn)
        assert Record.from_line(found.line()) == found
        given = {
            "rule": "sgd",
            "values": {"momentum": 0.9, **found.tuned.hypers},
            "options": found.tuned.options,
        }
        (again,) = run_study(study.model_copy(update={"arms": (Arm.model_validate(given),)}))
        assert again.measures == found.measures

    def test_values_of_a_tuned_grain_and_schedule_are_an_arm(self, tmp_path):
        shaped = {
            "rule": "alphagrad",
            "schedules": {"alpha": "piecewise:2"},
            "granularity": {"alpha": "tensor"},
        }
        arm = {**shaped, "learn": ["alpha"], "budget": "1s", "route": "gradient"}
        study = Study(name="t", problems=["wine-mlp"], arms=[arm], steps=4)
        (found,) = run_study(study)
        knots = found.tuned.hypers["alpha.knots"]
        assert len({len(row) for row in knots}) == 1 and len(knots[0]) > 1
        plain = Arm.model_validate({**shaped, "values": found.tuned.hypers})
        study = study.model_copy(update={"arms": (plain,)})
        assert study_from_yaml(study.to_yaml()) == study
        (again,) = run_study(study, out=tmp_path / "out.jsonl")
        assert again.measures == found.measures
        assert read(tmp_path / "out.jsonl") == [again]

    def test_an_interrupted_tuning_is_not_on_record(self, monkeypatch, tmp_path):
        stopped = SimpleNamespace(outcome=Outcome.INTERRUPTED)
        monkeypatch.setattr("hyperdescent.search.tune.tune", lambda *given, **named: stopped)
        arm = {"rule": "sgd", "learn": ["lr"]}
        study = Study(name="t", problems=["wine-mlp"], arms=[arm], steps=5)
        records = run_study(study, out=tmp_path / "out.jsonl")
        assert len(records) == 0 and records.missing == 1
        assert read(tmp_path / "out.jsonl") == []
