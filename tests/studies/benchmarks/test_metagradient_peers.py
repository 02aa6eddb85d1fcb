"""Peers of the benchmark against Replay, each in every hyper that it can differentiate."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.benchmarks.metagradient_peers import (
    PEERS,
    Peer,
    held_out_loss,
    train_plainly,
)
from hyperdescent.studies.benchmarks.workloads import (
    GPT,
    SEED,
    WORKLOADS,
    convolutions,
    find_workloads,
    perceptron,
)
from hyperdescent.studies.data_files import DATA

STEPS = 6
EXACT = 1e-9
# Of the derivative in lr by float64 problems. torchopt: its bias correction is float32. higher: it
# adds eps before the bias correction.
LR = {"torchopt": 1e-4, "higher": 1e-2}
REFUSED = {"torchopt": {"beta1", "beta2"}}


def small(name, model):
    return replace(WORKLOADS[name], model=model, steps=STEPS)


SGD = small("w1-sgd", partial(perceptron, 8))
ADAM = small("w1-adam", partial(perceptron, 8))
# Its every weight has a gradient, so it tells Adams apart that are NaN where one has none.
CNN = small("w3", partial(convolutions, 4))


def exact(workload, problem):
    training = Training(problem, find_rule(workload.rule), STEPS, values=workload.values)
    estimate, _ = Replay()(training, training.start(workload.values), None, seed=SEED)
    return estimate


@pytest.fixture(scope="module")
def solved():
    """Of each workload the problem, and what Replay says."""
    found = {}
    for workload in (SGD, ADAM, CNN):
        problem = workload.problem(torch.float64)
        found[workload] = problem, exact(workload, problem)
    return found


def errors(peer, workload, solved):
    """Relative, by hyper."""
    problem, estimate = solved[workload]
    answer = PEERS[peer](workload, problem)
    assert set(answer.slopes) <= set(estimate.grad)
    return answer, {n: abs(x / float(estimate.grad[n]) - 1) for n, x in answer.slopes.items()}


@pytest.mark.parametrize("peer", PEERS)
def test_sgd_agrees(peer, solved):
    answer, off = errors(peer, SGD, solved)
    assert answer.loss == pytest.approx(solved[SGD][1].loss, rel=1e-12)
    assert set(off) == {"lr", "momentum"} and max(off.values()) < EXACT


@pytest.mark.parametrize("peer", PEERS)
def test_adam_agrees_in_what_the_peer_can_differentiate(peer, solved):
    answer, off = errors(peer, CNN, solved)
    assert answer.loss == pytest.approx(solved[CNN][1].loss, rel=LR.get(peer, 1e-12))
    assert set(off) == {"lr", "beta1", "beta2"} - REFUSED.get(peer, set())
    assert off["lr"] < LR.get(peer, EXACT)
    if peer == "higher":
        assert off["beta1"] < LR[peer] and off["beta2"] > 1
    elif peer not in REFUSED:
        assert max(off.values()) < EXACT


def test_known_faults_with_a_weight_that_has_no_gradient(solved):
    _, off = errors("unrolled by hand", ADAM, solved)
    assert max(off.values()) < EXACT
    _, off = errors("higher", ADAM, solved)
    assert off["lr"] < LR["higher"] and off["beta2"] > 1
    assert errors("torchopt", ADAM, solved)[1]["lr"] < LR["torchopt"]
    answer, _ = errors("torch.optim(differentiable=True)", ADAM, solved)
    assert all(map(math.isnan, answer.slopes.values())) and math.isfinite(answer.loss)


@pytest.mark.parametrize("workload", [SGD, ADAM, CNN], ids=lambda workload: workload.name)
def test_plain_training_ends_where_replay_does(workload, solved):
    problem, estimate = solved[workload]
    loss = float(held_out_loss(train_plainly(workload, problem), problem).detach())
    assert loss == pytest.approx(estimate.loss, rel=1e-12)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_works_in_float32_and_leaves_the_global_generator(peer):
    before = torch.random.get_rng_state()
    answer = PEERS[peer](SGD, SGD.problem(torch.float32))
    assert math.isfinite(answer.loss)
    assert torch.equal(torch.random.get_rng_state(), before)


class TestLanguageModel:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv(DATA, str(tmp_path))
        return tmp_path

    def test_every_peer_agrees(self, folder):
        (folder / "tinyshakespeare.txt").write_text("Speak, speak.\n\nFirst Citizen:\n" * 500)
        workload = replace(small("w4", partial(GPT, 1, 8, 2)), batch=2)
        problem = workload.problem(torch.float64)
        estimate = exact(workload, problem)
        assert problem.splits["valid"].whole()[0].shape == (8, 128)
        for peer in PEERS.values():
            answer = peer(workload, problem)
            assert answer.loss == pytest.approx(estimate.loss, rel=1e-4)
            slope = float(estimate.grad["lr"])
            assert answer.slopes["lr"] == pytest.approx(slope, rel=LR.get(peer.name, 1e-6))

    def test_a_missing_text_is_told_with_what_to_do(self, folder, monkeypatch):
        with pytest.raises(FileNotFoundError, match=rf"{folder} has none: put .* set {DATA} to"):
            WORKLOADS["w4"].parts()
        monkeypatch.delenv(DATA)
        with pytest.raises(FileNotFoundError, match=f"{DATA} is not set: put "):
            WORKLOADS["w4"].parts()

    @pytest.mark.parametrize(("text", "told"), [("é" * 20_000, "holds 'é'"), ("a", "has 1 char")])
    def test_another_text_is_refused(self, folder, text, told):
        (folder / "tinyshakespeare.txt").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            WORKLOADS["w4"].parts()


def test_three_pixels_are_dark_in_every_digit():
    (train, _), _ = WORKLOADS["w1-sgd"].parts()
    assert int((train == 0).all(0).sum()) >= 3
    assert train.max() == 1


def test_workloads_by_name():
    assert [w.name for w in find_workloads(["w3", "w1-sgd", "w3"])] == ["w3", "w1-sgd"]
    assert [w.name for w in find_workloads([])] == [
        name for name in WORKLOADS if not name.startswith("gpt2")
    ]
    with pytest.raises(ValueError, match=r"no workload 'w1-sdg'; did you mean 'w1-sgd'\?.*w3, w4"):
        find_workloads(["w1-sdg"])


def test_a_peer_that_is_not_installed_says_so():
    absent = Peer("absent", lambda workload, problem: None, "a note", "no_such_package")
    assert absent.missing.startswith("no_such_package is not installed")
    assert not any(peer.missing for peer in PEERS.values())
