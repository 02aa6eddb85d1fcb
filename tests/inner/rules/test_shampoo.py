"""What is special in Shampoo: limits in which it is another rule, and its invariances."""

import pytest
import pytorch_optimizer
import torch

from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(optimizer, p, grads):
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def ours(name, start, grads, **given):
    p = torch.nn.Parameter(start.clone())
    return run(torch_form(RULES[name])([p], **given), p, grads)


class TestShampoo:
    @pytest.mark.parametrize("shape", [(5,), (3, 4), (4, 3, 2), (3, 2, 2, 3)])
    def test_is_that_of_pytorch_optimizer(self, shape):
        grads = [noise(k, *shape) for k in range(1, 20)]
        given = {"lr": 0.1, "weight_decay": 0.01, "matrix_eps": 1e-3}
        p = torch.nn.Parameter(noise(0, *shape))
        theirs = run(pytorch_optimizer.Shampoo([p], **given), p, grads)
        found = ours("shampoo", noise(0, *shape), grads, **given)
        torch.testing.assert_close(found, theirs, rtol=1e-11, atol=1e-11)

    def test_of_one_weight_is_adagrad(self):
        grads = [noise(k, 1) for k in range(1, 20)]
        theirs = ours(
            "adagrad", noise(0, 1), grads, lr=0.1, initial_accumulator_value=0.01, eps=0.0
        )
        found = ours("shampoo", noise(0, 1), grads, lr=0.1, matrix_eps=0.01)
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)

    def test_turns_with_the_weights(self):
        left, right = (torch.linalg.qr(noise(9, n, n))[0] for n in (3, 4))
        grads = [noise(k, 3, 4) for k in range(1, 10)]
        straight = ours("shampoo", noise(0, 3, 4), grads, lr=0.1)
        turned = ours(
            "shampoo", left @ noise(0, 3, 4) @ right, [left @ g @ right for g in grads], lr=0.1
        )
        torch.testing.assert_close(turned, left @ straight @ right, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 2, 2, 3)])
    def test_does_not_see_the_unit_of_the_loss(self, shape):
        # Statistics are squares, so eps is in the unit of the gradient squared, for any order only
        # if the powers of all dimensions make up 1/2.
        grads = [noise(k, *shape) for k in range(1, 10)]
        one = ours("shampoo", noise(0, *shape), grads, lr=0.1, matrix_eps=1e-3)
        big = ours("shampoo", noise(0, *shape), [100 * g for g in grads], lr=0.1, matrix_eps=10.0)
        torch.testing.assert_close(big, one, rtol=1e-10, atol=1e-10)

    def test_float32_of_low_rank_stays_finite(self):
        # 40 statistics of gradients of rank 1: all eigenvalues but a few are rounding.
        grads = [1e3 * torch.outer(noise(k, 40), noise(50, 3)[:]).float() for k in range(1, 30)]
        found = ours("shampoo", torch.zeros(40, 3), grads, lr=0.1)
        assert found.isfinite().all() and found.abs().max() < 10

    def test_a_long_dimension_keeps_a_diagonal(self):
        rule = RULES["shampoo"]
        assert rule.slot_shape("statistics", Layout.alone(torch.Size([2, 5000]))) == (4 + 5000,)
        # Of a vector that is Adagrad.
        grads = [noise(k, 5000) for k in range(1, 5)]
        theirs = ours(
            "adagrad", noise(0, 5000), grads, lr=0.1, initial_accumulator_value=0.01, eps=0.0
        )
        found = ours("shampoo", noise(0, 5000), grads, lr=0.1, matrix_eps=0.01)
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)


class TestScalableShampoo:
    GRAFTS = pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "rmsprop_normalized"])

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_before_its_start_is_sgd_with_momentum(self, nesterov):
        grads = [noise(k, 3, 4) for k in range(1, 10)]
        p = torch.nn.Parameter(noise(0, 3, 4))
        theirs = run(torch.optim.SGD([p], lr=0.1, momentum=0.8, nesterov=nesterov), p, grads)
        found = ours(
            "scalableshampoo",
            noise(0, 3, 4),
            grads,
            lr=0.1,
            beta1=0.8,
            nesterov=nesterov,
            start_preconditioning_step=100,
        )
        torch.testing.assert_close(found, theirs, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize("start", [1, 100])
    def test_grafted_to_rmsprop_a_single_weight_follows_it(self, start):
        grads = [noise(k, 1) for k in range(1, 10)]
        p = torch.nn.Parameter(noise(0, 1))
        theirs = run(torch.optim.RMSprop([p], lr=0.1, alpha=0.9, eps=1e-10, momentum=0.7), p, grads)
        found = ours(
            "scalableshampoo",
            noise(0, 1),
            grads,
            lr=0.1,
            beta1=0.7,
            beta2=0.9,
            graft="rmsprop",
            nesterov=False,
            start_preconditioning_step=start,
        )
        torch.testing.assert_close(found, theirs, rtol=1e-12, atol=1e-12)

    @GRAFTS
    @pytest.mark.parametrize("shape", [(6,), (3, 4), (3, 2, 2, 3)])
    def test_has_the_length_of_the_graft_on_every_tensor(self, shape, graft):
        moves = []
        for start in (1, 100):
            given = {"lr": 0.1, "beta1": 0.0, "graft": graft, "start_preconditioning_step": start}
            before, grads = noise(0, *shape), [noise(k, *shape) for k in range(1, 6)]
            paths = [ours("scalableshampoo", before, grads[:k], **given) for k in (4, 5)]
            moves.append(paths[1] - paths[0])
        norms = [move.norm() for move in moves]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-12, atol=0)
        assert not torch.allclose(moves[0], moves[1], rtol=1e-2)

    def test_normalized_graft_does_not_see_the_length_of_gradients(self):
        grads = [noise(k, 3, 4) for k in range(1, 8)]
        given = {"lr": 0.1, "graft": "rmsprop_normalized", "matrix_eps": 0.0}
        one = ours("scalableshampoo", noise(0, 3, 4), grads, **given)
        big = ours("scalableshampoo", noise(0, 3, 4), [1000 * g for g in grads], **given)
        torch.testing.assert_close(big, one, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("start", [1, 100])
    def test_decay_is_by_lr_once(self, start):
        # Google's code as found multiplies by lr twice.
        zero = [torch.zeros(3, 4, dtype=F64)] * 3
        given = {"lr": 0.1, "weight_decay": 0.2, "start_preconditioning_step": start}
        found = ours("scalableshampoo", noise(0, 3, 4), zero, **given)
        torch.testing.assert_close(found, noise(0, 3, 4) * (1 - 0.1 * 0.2) ** 3)

    def test_a_tensor_with_a_long_dimension_has_no_statistics(self):
        rule = RULES["scalableshampoo"]
        sizes = {(2, 5000): 0, (1, 1): 0, (3, 1, 4): 25, (4096,): 4096**2}
        for shape, size in sizes.items():
            unit = Layout.alone(torch.Size(shape))
            assert rule.slot_shape("statistics", unit) == (size,), shape
