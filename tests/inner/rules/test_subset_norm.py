import pytest
import torch
from pytorch_optimizer.optimizer.snsm import AdamWSN

from hyperdescent.inner.registry import RULES
from hyperdescent.inner.rules.subset_norm import basis, subsets
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def number(x):
    return torch.tensor(x, dtype=F64)


def run(rule, gradients, **given):
    values = rule.values(given)
    p = torch.ones_like(gradients[0])
    s = rule.init(p, values)
    for step, g in enumerate(gradients, start=1):
        p, s = rule(p, g, s, number(step), values)
    return p, s


def test_subset_norm_of_a_tall_matrix_is_pytorch_optimizers():
    # Its subsets are pieces of the flat tensor: rows, where those are the shorter side.
    ours, theirs = (torch.nn.Parameter(normal(0, 6, 4)) for _ in range(2))
    given = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    steps = (
        (ours, torch_form(RULES["subsetnorm"])([ours], **given)),
        (theirs, AdamWSN([{"params": [theirs], "sn": True}], subset_size=4, **given)),
    )
    for step in range(1, 20):
        for p, optimizer in steps:
            p.grad = normal(step, 6, 4)
            optimizer.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((6, 4), (6, 1)), ((4, 6), (1, 6)), ((4, 4), (4, 1)), ((5,), (5,)), ((4, 3, 2, 2), (1, 12))],
)
def test_a_matrix_has_as_many_second_moments_as_its_longer_side(shape, kept):
    assert subsets(torch.Size(shape)) == kept
    rule = RULES["subsetnorm"]
    assert rule.init(torch.zeros(shape), rule.values())["v"].shape == kept


@pytest.mark.parametrize("name", ["subsetnorm", "snsm"])
def test_turning_a_matrix_turns_its_steps(name):
    gradients = [normal(step, 5, 3) for step in range(8)]
    rule = RULES[name].choose(**({"rank": 2, "update_proj_gap": 3} if name == "snsm" else {}))
    turned, _ = run(rule, [g.mT for g in gradients], lr=0.1)
    torch.testing.assert_close(run(rule, gradients, lr=0.1)[0], turned.mT, rtol=1e-13, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 30])
def test_the_basis_is_orthonormal_in_every_size(size):
    whole, part = (basis(size, rank, number(3.0), 0) for rank in (size, (size + 1) // 2))
    torch.testing.assert_close(whole @ whole.mT, torch.eye(size, dtype=F64), rtol=0, atol=1e-13)
    assert torch.equal(part, whole[: (size + 1) // 2])


def test_subspaces_differ_with_the_change_and_the_seed():
    projectors = [
        b.mT @ b
        for b in (basis(5, 2, number(c), seed) for c, seed in ((0.0, 0), (1.0, 0), (0.0, 1)))
    ]
    for first, other in zip(projectors, [*projectors[1:], projectors[0]], strict=True):
        assert (first - other).abs().max() > 0.1


@pytest.mark.parametrize("name", ["subspacemomentum", "snsm"])
@pytest.mark.parametrize(
    ("shape", "kept"),
    [((6, 4), (3, 6)), ((4, 9), (3, 9)), ((2, 9), (2, 9)), ((5, 3, 2, 2), (3, 12))],
)
def test_momentum_is_as_long_as_the_subspace_is_wide(name, shape, kept):
    rule = RULES[name].choose(rank=3)
    assert rule.init(torch.zeros(shape), rule.values())["m"].shape == kept
    assert rule.init(torch.zeros(7), rule.values())["m"].shape == (7,)


def test_without_a_denominator_there_are_no_second_moments():
    rule = RULES["subspacemomentum"].choose(second_moment="none")
    assert rule.init(torch.zeros(6, 4), rule.values())["v"].numel() == 0


def test_momentum_in_a_subspace_that_is_everything_is_momentum():
    gradients = [normal(step, 4, 6) for step in range(20)]
    ours, _ = run(RULES["snsm"].choose(rank=4), gradients, lr=0.1)
    torch.testing.assert_close(
        ours, run(RULES["subsetnorm"], gradients, lr=0.1)[0], rtol=1e-11, atol=0
    )


def inside(g, change):
    b = basis(4, 2, number(change), 0)
    return b.mT @ b @ g


def test_the_gradient_outside_is_as_it_is_and_momentum_begins_anew():
    rule = RULES["subspacemomentum"].choose(
        rank=2, update_proj_gap=3, second_moment="none", correct_bias=False
    )
    gradients = [normal(step, 4, 6) for step in range(5)]
    ends = [run(rule, gradients[:count], lr=1.0)[0] for count in range(2, 5)]
    third, fourth = ends[0] - ends[1], ends[1] - ends[2]
    part = inside(gradients[2], 1.0)
    # The third step is in a new subspace: a tenth of the gradient there, all of it outside.
    torch.testing.assert_close(third, gradients[2] - 0.9 * part, rtol=1e-12, atol=1e-13)
    after = inside(gradients[3], 1.0)
    expected = gradients[3] - after + 0.1 * after + 0.09 * part
    torch.testing.assert_close(fourth, expected, rtol=1e-12, atol=1e-13)


def test_a_sum_of_squares_moves_on():
    # The authors' code, with beta2 = 1 and its correction of the bias, stands still.
    rule = RULES["subsetnorm"].choose(second_moment="sum")
    gradients = [torch.full((3, 2), 2.0, dtype=F64)] * 4
    p, s = run(rule, gradients, lr=0.1, eps=0.0)
    assert torch.equal(s["v"], torch.full((3, 1), 4 * 2 * 4.0, dtype=F64))
    # Steps are 2 / sqrt(8 k), of momentum without bias, in the direction of a constant gradient.
    moved = sum(0.1 * 2 / (8 * k) ** 0.5 for k in range(1, 5))
    torch.testing.assert_close(p, torch.full_like(p, 1 - moved), rtol=1e-12, atol=0)


def test_second_moments_of_bfloat16_weights_follow_small_changes():
    rule = RULES["subsetnorm"]
    gradients = [torch.ones(4, 2, dtype=torch.bfloat16)] * 200
    _, s = run(rule, gradients)
    assert s["v"].dtype == torch.float32
    known = torch.full((4, 1), 2 * (1 - 0.999**200))
    torch.testing.assert_close(s["v"], known, rtol=1e-4, atol=0)
