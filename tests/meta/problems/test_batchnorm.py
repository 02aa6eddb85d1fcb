"""Our batch norm against torch's own, values and running statistics."""

import copy

import pytest
import torch
from torch import nn

from hyperdescent.meta.problems.batchnorm import carry_statistics

DOUBLE = torch.float64
INPUTS = {
    nn.BatchNorm1d: [(6, 3), (4, 3, 5)],
    nn.BatchNorm2d: [(4, 3, 5, 2)],
    nn.BatchNorm3d: [(2, 3, 2, 3, 4)],
}
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
]


def pair(kind, **options):
    torchs = kind(3, **options).double()
    with torch.no_grad():
        for p in torchs.parameters():
            p.add_(torch.rand_like(p))
    ours = copy.deepcopy(torchs)
    carry_statistics(ours)
    return torchs, ours


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"), [(k, s) for k, shapes in INPUTS.items() for s in shapes], ids=str
)
def test_is_torchs(kind, shape, options):
    torchs, ours = pair(kind, **options)
    for training in (True, True, True, False):
        torchs.train(training), ours.train(training)
        x = 2 + 3 * torch.randn(shape, dtype=DOUBLE)
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-12, atol=1e-12)
        expected = dict(torchs.named_buffers())
        assert dict(ours.named_buffers()).keys() == expected.keys()
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, expected[name], rtol=1e-13, atol=1e-13)


def test_evaluation_changes_nothing():
    _, ours = pair(nn.BatchNorm1d)
    ours(torch.randn(6, 3, dtype=DOUBLE))
    before = {name: b.clone() for name, b in ours.named_buffers()}
    ours.eval()(torch.randn(6, 3, dtype=DOUBLE))
    assert all(torch.equal(b, before[name]) for name, b in ours.named_buffers())


def test_the_statistics_carry_gradients():
    _, ours = pair(nn.BatchNorm1d, momentum=0.3)
    x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    ours(x)
    (slope,) = torch.autograd.grad(ours.running_mean.sum(), x, retain_graph=True)
    torch.testing.assert_close(slope, torch.full_like(x, 0.3 / 6))
    (slope,) = torch.autograd.grad(ours.running_var.sum(), x)
    torch.testing.assert_close(slope, 0.3 * 2 / 5 * (x - x.mean(0)).detach())


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=str)
def test_one_value_per_channel_is_refused(options):
    torchs, ours = pair(nn.BatchNorm1d, **options)
    for norm in (torchs, ours):
        with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
            norm(torch.randn(1, 3, dtype=DOUBLE))


def test_a_wrong_rank_is_refused():
    _, ours = pair(nn.BatchNorm2d)
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.randn(4, 3, dtype=DOUBLE))


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return torch.tanh(super().forward(x)) + 1


class Fused(nn.BatchNorm1d):
    """A forward that asks nobody: its statistics can be carried, but not differentiated."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training)


@pytest.mark.parametrize("kind", [Activated, Fused])
def test_a_subclass_keeps_its_own_forward(kind):
    torchs, ours = pair(kind)
    for training in (True, True, False):
        torchs.train(training), ours.train(training)
        x = torch.randn(6, 3, dtype=DOUBLE)
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-12, atol=1e-12)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, torchs.get_buffer(name), rtol=1e-13, atol=1e-13)


def test_a_subclass_that_asks_its_parent_has_differentiable_statistics():
    _, ours = pair(Activated, momentum=0.3)
    x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
    ours(x)
    (slope,) = torch.autograd.grad(ours.running_mean.sum(), x)
    torch.testing.assert_close(slope, torch.full_like(x, 0.3 / 6))


def test_other_instances_and_synchronized_ones_stay_torchs():
    carry_statistics(sync := nn.SyncBatchNorm(3))
    assert type(sync).forward is nn.SyncBatchNorm.forward
    _, ours = pair(nn.BatchNorm1d)
    assert isinstance(ours, nn.BatchNorm1d)
    assert type(nn.BatchNorm1d(3)).forward is not type(ours).forward
