"""Built-in problems: every one trains, is differentiable, and keeps its splits apart."""

import subprocess
import sys

import cloudpickle
import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.problems.problem import loss_at
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.problems import PROBLEMS, load_problem


def short(problem):
    return Training(problem, find_rule("adam"), 5, values={"lr": 0.01})


@pytest.mark.parametrize("name", PROBLEMS)
class TestProblem:
    def test_five_steps_have_a_finite_gradient_in_every_hyper(self, name):
        problem = load_problem(name)
        training = short(problem)
        learn = ["lr", "beta1", "beta2", *problem.hypers]
        estimate, _ = Replay()(training, training.start(learn), seed=0)
        assert estimate.note.outcome is Outcome.OK
        assert set(estimate.grad) == set(learn)
        assert all(grad.isfinite().all() and grad.any() for grad in estimate.grad.values())

    def test_training_lowers_the_loss_on_every_split(self, name):
        training = short(load_problem(name))
        resolved = training.resolve({})
        values = resolved.at(0)
        ends = training.begin(values, 0), run_training(training, resolved, 0).state
        for split in ("train", "valid", "test"):
            first, last = (training.measure(state, values, split)["loss"] for state in ends)
            assert last < first

    def test_parts_are_disjoint_float32_and_all_of_the_data(self, name):
        parts = load_problem(name).splits
        inputs = [part.whole()[0] for part in parts.values()]
        rows = torch.cat(inputs)
        assert all(x.dtype == torch.float32 for x in inputs)
        assert list(parts) == ["train", "valid", "test"]
        # A few examples of the data themselves are equal; no more than those.
        assert len(rows) - len(rows.unique(dim=0)) <= 1
        assert len(inputs[1]) == len(inputs[2]) == -(-len(rows) // 4)

    def test_another_split_is_another_division_of_the_same_data(self, name):
        one, two = (load_problem(name, split=split).splits["train"].whole()[0] for split in (0, 1))
        assert one.shape == two.shape and not torch.equal(one, two)

    def test_a_pickled_copy_trains_alike(self, name):
        problem = load_problem(name)
        copy = cloudpickle.loads(cloudpickle.dumps(problem))
        ends = [
            run_training(short(each), short(each).resolve({}), 3).state.p
            for each in (problem, copy)
        ]
        assert torch.equal(*ends)

    def test_every_choice_is_taken(self, name):
        problem = load_problem(name)
        for option, choice in problem.choices.items():
            for value in getattr(choice, "options", None) or (choice.low, choice.high):
                chosen = problem.choose(**{option: value})
                loss, _ = loss_at(chosen, *chosen.start(0), {}, 0, 0)
                assert loss.isfinite()


def test_inputs_are_standardized_by_the_train_part_alone():
    train = load_problem("wine-mlp").splits["train"].whole()[0]
    torch.testing.assert_close(train.mean(0), torch.zeros(13), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0), torch.ones(13))
    valid = load_problem("wine-mlp").splits["valid"].whole()[0]
    assert valid.mean(0).abs().max() > 0.05


def test_options_reach_the_model():
    params, _ = load_problem("digits-mlp", width=32, depth=3).start(0)
    assert [tuple(p.shape) for p in params.values() if p.ndim == 2] == [
        (32, 64),
        (32, 32),
        (32, 32),
        (10, 32),
    ]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'digits-mlp'.*wine-mlp"):
        load_problem("digit-mlp")
    with pytest.raises(TypeError, match="did you mean 'width'"):
        load_problem("digits-mlp", widht=3)
    with pytest.raises(ValueError, match="'nowhere:make' cannot be imported"):
        load_problem("nowhere:make")
    with pytest.raises(TypeError, match="returned dict, not a Problem"):
        load_problem("builtins:dict", width=3)
    with pytest.raises(TypeError, match="is float, not a function"):
        load_problem("math:pi")


def test_importing_problems_loads_nothing_heavy():
    code = (
        "import sys, hyperdescent.studies.problems, hyperdescent.studies.engine.executors\n"
        "heavy = {'sklearn', 'ray', 'optuna', 'pydantic', 'yaml', 'rich', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
