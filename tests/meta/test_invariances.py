"""U15 and U17 of the specification: going back by reversal, scales of hypers, orders in a batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import Around, examples, mlp
from toys import DOUBLE, Toy

from hyperdescent.inner.core.hyper import Hyper, positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.coordinates import Coordinates
from hyperdescent.meta.training.training import Training

L2 = 2.0  # So that the Hessian is positive definite.
EXACT = Replay(compile=False)


class Forced(Toy):
    """A pull that every step changes, so that momentum never comes to rest."""

    def batch(self, step, seed):
        return torch.tensor(math.cos(step), dtype=DOUBLE)

    def inner_loss(self, params, buffers, hypers, batch):
        return self.inner(params["w"], hypers) + batch * params["w"].sum(), buffers


class TestReversal:
    """Heavy ball undone step by step, as Maclaurin, Duvenaud & Adams 2015 (arXiv:1502.03492) do it,
    but in floating point: every step back divides by the momentum, and rounding with it."""

    CURVES = torch.linspace(0.2, 1.0, 10, dtype=DOUBLE)
    START = torch.linspace(-1.0, 1.0, 10, dtype=DOUBLE)
    LR = 0.0005  # Below what makes it swing, where each way keeps the root of the momentum.

    def there(self, momentum, steps, lr=LR):
        w, v = self.START.clone(), torch.zeros_like(self.START)
        for i in range(steps):
            v = momentum * v + torch.sinh(self.CURVES * w) + math.cos(i)
            w = w - lr * v
        return w, v

    def by_reversal(self, momentum, steps):
        """(velocity that reversal comes back to, which began as 0; d held-out loss / d lr)."""
        w, v = self.there(momentum, steps)
        over_w, over_v, slope = 2 * w, torch.zeros_like(w), 0.0
        for i in reversed(range(steps)):
            # The adjoint of w - lr v and of momentum v + g, at the state that reversal makes.
            over_v = over_v - self.LR * over_w
            slope -= float(over_w @ v)
            w = w + self.LR * v
            over_w = over_w + self.CURVES * torch.cosh(self.CURVES * w) * over_v
            v = (v - torch.sinh(self.CURVES * w) - math.cos(i)) / momentum
            over_v = momentum * over_v
        return v, slope

    def by_replay(self, momentum, steps):
        def inner(w, hypers):
            return (torch.cosh(self.CURVES * w) / self.CURVES).sum()

        toy = Forced(inner, lambda w, h: (w**2).sum(), self.START)
        run = Training(toy, find_rule("sgd"), steps, values={"lr": self.LR, "momentum": momentum})
        return float(EXACT(run, run.start(["lr"]), seed=0)[0].grad["lr"])

    @pytest.mark.parametrize(("momentum", "steps"), [(0.9, 50), (0.9, 100), (0.5, 15)])
    def test_while_rounding_has_not_grown_it_is_the_replayed_gradient(self, momentum, steps):
        """In which no line of this project's takes part."""
        _, slope = self.by_reversal(momentum, steps)
        grown = momentum**-steps * torch.finfo(DOUBLE).eps
        assert self.by_replay(momentum, steps) == pytest.approx(slope, rel=10 * grown)

    @pytest.mark.parametrize(
        ("momentum", "steps"), [(0.9, 100), (0.9, 200), (0.9, 300), (0.5, 25), (0.5, 40)]
    )
    def test_its_error_grows_as_the_momentum_to_the_power_of_minus_steps(self, momentum, steps):
        velocity, _ = self.by_reversal(momentum, steps)
        grown = momentum**-steps * torch.finfo(DOUBLE).eps
        assert grown / 10 < float(velocity.norm()) < 10 * grown

    def test_where_it_is_lost_the_replayed_gradient_is_not(self):
        momentum, steps, h = 0.5, 120, self.LR / 20
        _, slope = self.by_reversal(momentum, steps)
        replayed = self.by_replay(momentum, steps)
        assert not slope == pytest.approx(replayed, rel=0.1)
        rough, fine = (
            sum(
                sign * float(self.there(momentum, steps, self.LR + sign * step)[0].square().sum())
                for sign in (1, -1)
            )
            / (2 * step)
            for step in (h, h / 2)
        )
        assert replayed == pytest.approx((4 * fine - rough) / 3, rel=1e-8)


def penalized(of_l2, hyper):
    def loss(output, target, *, hypers, params):
        penalty = sum(p.square().sum() for p in params.values()) / 2
        return F.cross_entropy(output, target) + of_l2(hypers["l2"]) * penalty

    return problem_from_module(
        mlp,
        loss,
        examples(24, 5),
        examples(16, 5, seed=1),
        batch_size=8,
        hypers={"l2": hyper},
        outer_loss_fn=F.cross_entropy,
    )


class TestLogarithm:
    """d loss / d log x is x times d loss / d x, however one comes by it."""

    @pytest.mark.parametrize("method", [EXACT, Implicit(tolerance=math.inf)])
    def test_a_hyper_that_is_the_logarithm_itself(self, method):
        as_it_is = penalized(lambda x: x, positive(L2, search=(1e-6, 10.0)))
        of_log = penalized(torch.exp, Hyper(math.log(L2), -20.0, 5.0, "linear", (-10.0, 2.0)))
        grads = []
        for problem in (as_it_is, of_log):
            run = Training(problem, find_rule("adam"), 20, values={"lr": 0.03})
            point = {"l2": torch.tensor(run.problem.hypers["l2"].default, dtype=DOUBLE)}
            grads.append(float(method(run, point, seed=0)[0].grad["l2"]))
        assert grads[1] == pytest.approx(L2 * grads[0], rel=1e-12)

    @pytest.mark.parametrize(
        ("name", "slope"),
        [("lr", lambda x: x), ("l2", lambda x: x), ("beta1", lambda x: x * (1 - x))],
    )
    def test_coordinates_pull_gradients_by_it(self, name, slope):
        problem = penalized(lambda x: x, positive(L2, search=(1e-6, 10.0)))
        run = Training(problem, find_rule("adam"), 20, values={"lr": 0.03})
        point = run.start([name])
        grad = EXACT(run, point, seed=0)[0].grad
        space = Coordinates({name: run.hypers[name]})
        pulled = space.pull(space.free(point), grad)
        assert float(pulled) == pytest.approx(float(slope(point[name]) * grad[name]), rel=1e-12)


class Shuffled(Around):
    """Every batch with its examples in another order."""

    def start(self, seed):
        return self.problem.start(seed)

    def batch(self, step, seed):
        inputs, target = self.problem.batch(step, seed)
        draw = torch.Generator().manual_seed(step)
        order = torch.randperm(len(target), generator=draw)
        assert not torch.equal(order, torch.arange(len(target)))
        return inputs[order], target[order]

    def inner_loss(self, params, buffers, hypers, batch):
        return self.problem.inner_loss(params, buffers, hypers, batch)

    def outer_loss(self, params, buffers, hypers):
        return self.problem.outer_loss(params, buffers, hypers)


@pytest.mark.parametrize("method", [EXACT, Implicit(tolerance=math.inf)])
def test_the_order_of_examples_in_a_batch_is_nothing(method):
    plain = penalized(lambda x: x, positive(L2, search=(1e-6, 10.0)))
    grads = []
    for problem in (plain, Shuffled(plain)):
        run = Training(problem, find_rule("adam"), 20, values={"lr": 0.03})
        estimate, _ = method(run, run.start(["l2"]), seed=0)
        grads.append(float(estimate.grad["l2"]))
    assert grads[0] != 0 and grads[1] == pytest.approx(grads[0], rel=1e-12)
