"""The command line: what it prints, its exit codes, Ctrl-C, and going on."""

import json
import signal
import subprocess
import sys
import time

import pytest

from hyperdescent.inner.registry import RULES
from hyperdescent.scripts import command
from hyperdescent.studies.problems import PROBLEMS

COMMAND = [sys.executable, "-m", "hyperdescent.scripts.command"]
WINE = ["tune", "--problem", "wine-mlp", "--steps", "5"]
LEARN = [*WINE, "--learn", "lr,beta1"]
# Like the installed script, without the current folder on sys.path.
SCRIPT = [sys.executable, "-P", *COMMAND[1:]]

# A problem of a user's own; it fails for seed 1, and one that cannot even be made.
MINE = """
from hyperdescent.studies.problems import load_problem

class Mine:
    def __init__(self, problem):
        self.problem = problem
    def __getattr__(self, name):
        return getattr(self.__dict__["problem"], name)
    def batch(self, step, seed):
        if seed == 1:
            raise RuntimeError("not this seed")
        return self.problem.batch(step, seed)

def make():
    return Mine(load_problem("wine-mlp"))

def broken():
    return 1 + "1"
"""
STUDY = "{name: small, problems: [%s], arms: [{rule: adam}], seeds: %d, steps: %d}"


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hyperdescent", *arguments])
        code = 0
        try:
            command.main()
        except SystemExit as done:
            code = done.code or 0
        return code, *capsys.readouterr()

    return run


def one_line(told):
    assert told.startswith("error: ") and told.count("\n") == 1 and "Traceback" not in told
    return told


class TestTune:
    def test_it_prints_a_table_the_route_and_the_reason(self, tmp_path):
        told = subprocess.run(
            [*COMMAND, *WINE, "--budget", "2s", "--out", str(tmp_path), "--learn", "lr,beta1"],
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        for part in ("adamw on wine-mlp", "lr", "beta1", "0.001", "held-out loss"):
            assert part in told.stdout
        # In the order of the rule's signature.
        assert told.stdout.index("│ lr ") < told.stdout.index("│ beta1 ")
        assert "route: gradient, because all 2 learned numbers are smooth" in told.stdout
        assert str(tmp_path) in told.stdout.replace("\n", "")
        assert (tmp_path / "schedule.png").stat().st_size > 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["outcome"] == "ok"
        assert f"after {len(result['history'])} evaluations" in told.stdout

    def test_flags_reach_the_run(self, call, tmp_path):
        code, told, _ = call(
            *("tune", "--problem", "wine-mlp", "--rule", "sgd", "--steps", "4", "--budget", "1s"),
            *("--learn", "lr,momentum", "--schedule", "lr=piecewise:3", "--values", "lr=0.05"),
            *("--option", "nesterov=true", "--option", "width=8", "--option", "activation=tanh"),
            *("--values", "momentum=0.5", "--seed", "3", "--out", str(tmp_path)),
        )
        assert code == 0
        settings = json.loads((tmp_path / "settings.json").read_text())
        assert settings["problem_options"] == {"width": 8, "activation": "tanh"}
        assert settings["rule_options"]["nesterov"] is True
        assert settings["schedules"] == {"lr": "piecewise:3"}
        assert settings["values"] == {"lr": 0.05, "momentum": 0.5}
        assert (settings["seed"], settings["steps"], settings["rule"]) == (3, 4, "sgd")
        assert "sgd on wine-mlp" in told

    def test_grains_and_discrete_options_are_learned(self, call):
        code, told, _ = call(
            *("tune", "--problem", "wine-mlp", "--rule", "alphagrad", "--steps", "3"),
            *("--learn", "alpha,width", "--granularity", "alpha=tensor", "--budget", "2s"),
        )
        assert code == 0
        assert "route: search" in told
        assert "there is no gradient in width (integer)" in " ".join(told.split())

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["--problem", "wine-mpl"], "'wine-mpl'; did you mean 'wine-mlp'"),
            (["--rule", "adamm"], "'adamm'; did you mean 'adam'"),
            (["--learn", "leraning_rate"], "'leraning_rate'"),
            (["--values", "lr"], "--values 'lr' is not NAME=VALUE"),
            (["--values", "lr=fast"], "--values lr='fast' is not a number"),
            (["--values", "=1"], "--values '=1' is not NAME=VALUE"),
            (["--values", "lr=0"], "lr=0 has no place on its log scale"),
            (["--schedule", "lr"], "--schedule 'lr' is not NAME=VALUE"),
            (["--schedule", "lr=cosin"], "'cosin'; did you mean 'cosine'"),
            (["--granularity", "lr="], "--granularity 'lr=' is not NAME=VALUE"),
            (["--granularity", "lr=tensors"], "'tensors'; did you mean 'tensor'"),
            (["--option", "widht=8"], "'widht'; did you mean 'width'"),
            (["--option", "width=wide"], "width='wide' is not a whole number"),
            (["--budget", "soon"], "budget='soon' is not a time"),
            (["--route", "serach"], "'serach'; did you mean 'search'"),
            (["--steps", "0"], "steps=0 trains nothing"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_2(self, call, arguments, told):
        code, out, err = call(*WINE, *arguments)
        assert (code, out) == (2, "")
        assert told in one_line(err)

    @pytest.mark.parametrize(
        "arguments",
        [["tune"], ["tune", "--problem"], [*WINE, "--bogus"], ["bogus"], [*WINE, "--steps", "x"]],
    )
    def test_wrong_usage_is_exit_code_2_without_a_traceback(self, call, arguments):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert "Error" in err and "Traceback" not in err

    def test_help_says_what_there_is(self, call):
        code, out, _ = call("--help")
        assert code == 0
        for name in ("tune", "study", "rules", "problems", "demo"):
            assert name in out


class TestErrors:
    def test_a_variable_shows_where_an_error_comes_from(self, call, monkeypatch):
        assert "HYPERDESCENT_TRACEBACK=1" in " ".join(call("--help")[1].split())
        monkeypatch.setenv(command.TRACEBACK, "1")
        code, _, err = call(*WINE, "--rule", "adamm")
        assert code == 2
        assert "Traceback" in err and err.splitlines()[-1].startswith("error: ")

    def test_an_error_of_other_code_says_how_to_see_where(self, call, monkeypatch, tmp_path):
        (tmp_path / "with_bug.py").write_text(MINE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        code, _, err = call("tune", "--problem", "with_bug:broken")
        assert code == 2
        assert "unsupported operand" in one_line(err) and "HYPERDESCENT_TRACEBACK=1" in err
        for arguments in (["study", "none.yaml", "--out", "."], ["tune", "--problem", "with-bug"]):
            assert "TRACEBACK" not in one_line(call(*arguments)[2])


class TestOwnProblem:
    def test_it_lies_in_the_current_folder_where_nothing_is_written(self, tmp_path):
        (tmp_path / "mine.py").write_text(MINE)
        told = subprocess.run(
            [*SCRIPT, *WINE, "--problem", "mine:make", "--budget", "1s"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        assert {file.name for file in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}

    @pytest.mark.sampled(0)
    def test_workers_find_it_and_a_cell_that_fails_is_exit_code_1(self, tmp_path):
        (tmp_path / "mine.py").write_text(MINE)
        (tmp_path / "study.yaml").write_text(STUDY % ("'mine:make'", 2, 3))
        told = subprocess.run(
            [*SCRIPT, "study", "study.yaml", "--out", "run"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 1, told.stderr
        assert "adam on mine:make, seed 0: valid loss " in told.stdout
        failed = "1 of 2 cells failed, first adam on mine:make, seed 1: RuntimeError: not this seed"
        assert failed in " ".join(told.stdout.split())


class TestLists:
    def test_rules_lists_every_rule_with_its_hypers(self, call):
        code, out, _ = call("rules")
        assert code == 0
        for name, rule in RULES.items():
            assert f" {name} " in out
            assert all(hyper in out for hyper in rule.hypers)

    def test_problems_lists_every_problem(self, call):
        code, out, _ = call("problems")
        assert code == 0
        assert all(f" {name} " in out for name in PROBLEMS)


class Session:
    """A command of its own process on one folder."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--out", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def interrupt(self, when):
        """Press Ctrl-C as soon as `when()`; (exit code, stdout, stderr)."""
        # The start of Python and torch on a busy machine.
        deadline = time.monotonic() + 120
        while not when() and time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        time.sleep(1)  # What is written is told a moment later, on a busy machine.
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self):
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    @property
    def result(self):
        return json.loads((self.folder / "result.json").read_text())


def test_ctrl_c_keeps_the_best_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "run"
    first = Session(folder, *LEARN, "--budget", "1h")
    code, out, err = first.interrupt((folder / "state.pt").exists)
    assert code == 130, err
    assert "interrupted" in out and "Traceback" not in err
    before = first.result
    assert before["outcome"] == "interrupted"
    assert before["history"]

    second = Session(folder, *LEARN, "--budget", f"{before['settings']['spent'] + 1}s")
    code, out, err = second.end()
    assert code == 0, err
    after = second.result
    assert after["outcome"] == "ok"
    assert after["history"][: len(before["history"])] == before["history"]
    assert len(after["history"]) > len(before["history"])


def test_a_second_run_on_a_folder_in_use_is_refused(tmp_path, call):
    first = Session(tmp_path, *LEARN, "--budget", "1h")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "state.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        code, _, err = call(*WINE, "--learn", "lr,beta1", "--out", str(tmp_path))
        assert code == 2
        assert f"{tmp_path} is in use by another run" in one_line(err)
    finally:
        first.process.kill()
        first.end()
    # Killed, not asked to stop: the folder is free at once and the run goes on.
    code, out, _ = call(*WINE, "--learn", "lr,beta1", "--out", str(tmp_path), "--budget", "3s")
    assert code == 0, out


def test_ctrl_c_of_a_study_shows_what_there_is_and_the_same_command_goes_on(tmp_path, call):
    file, out = tmp_path / "study.yaml", tmp_path / "run"
    file.write_text(STUDY % ("wine-mlp", 3, 4000))
    arguments = ["study", str(file), "--serial"]
    records = out / "records.jsonl"
    first = Session(out, *arguments)
    code, told, err = first.interrupt(lambda: records.exists() and records.stat().st_size > 0)
    assert code == 130, err
    assert "Traceback" not in err
    assert "seed 0: valid loss" in told and "1/1" in told and "the same command goes on" in told
    kept = records.read_bytes()
    code, told, _ = call(*arguments, "--out", str(out))
    assert code == 0 and "3/3" in told and "seed 0" not in told
    assert records.read_bytes().startswith(kept)


class TestCompare:
    CANCER = ("compare", "--problem", "breast-cancer-logistic", "--learn", "l2", "--steps", "20")

    def test_a_table_and_a_picture(self, call, tmp_path):
        picture = tmp_path / "methods.png"
        code, out, err = call(
            *self.CANCER, "--method", "replay,implicit,one-pass", "--out", str(picture)
        )
        assert (code, err) == (0, "")
        for told in ("cosine", "gradients", "implicit", "one-pass", "against replay, exact"):
            assert told in out
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_what_a_method_refuses_is_in_the_table(self, call):
        code, out, _ = call(
            "compare", "--problem", "wine-mlp", "--steps", "5", "--method", "implicit,sama"
        )
        assert code == 0
        assert out.count("lr is a hyperparameter of sgd") >= 2

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (["--method", "newton"], "there is no method 'newton'"),
            (["--reference", "truth"], "there is no reference 'truth'"),
            (["--learn", "l3"], "has no hyper 'l3'"),
        ],
    )
    def test_what_cannot_be_meant(self, call, more, told):
        code, _, err = call(*self.CANCER, *more)
        assert code == 2 and told in one_line(err)
