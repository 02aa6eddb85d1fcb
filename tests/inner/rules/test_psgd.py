"""What is special in PSGD: what it whitens, and what does not change it."""

import pytest
import torch

from hyperdescent.inner.core.layout import Layout
from hyperdescent.inner.registry import RULES
from hyperdescent.inner.rules.psgd import _balanced
from hyperdescent.inner.torch_form.optimizer import torch_form

F64 = torch.float64
each = pytest.mark.parametrize("name", ["psgdxmat", "psgdlra", "psgdkron"])


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def run(name, grads, shape, **options):
    rule = RULES[name].choose(**{n: v for n, v in options.items() if n in RULES[name].choices})
    values = rule.values({n: v for n, v in options.items() if n in rule.hypers})
    p = torch.zeros(shape, dtype=F64)
    s = rule.init(p, values)
    for step, g in enumerate(grads, 1):
        p, s = rule(p, g, s, torch.tensor(step, dtype=F64), values)
    return p, s


def inverse_root(covariance):
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values**-0.5 @ vectors.mT


def far(found, exact):
    return float(torch.linalg.norm(found - exact) / torch.linalg.norm(exact))


class TestWhitens:
    """P goes to E[gg']^(-1/2), wherever the form can hold it."""

    # The step of the fit leaves P noise of its root: from 0.1, where a path has settled, to 0.01.
    RATES = ((0.1, 600), (0.02, 600), (0.005, 1000))

    def fit(self, name, mix, shape):
        rule = RULES[name]
        s, step = None, 0
        for rate, steps in self.RATES:
            values = rule.values({"lr_preconditioner": rate, "lr": 0.0})
            p = torch.zeros(shape, dtype=F64)
            s = s or rule.init(p, values)
            for _ in range(steps):
                step += 1
                g = (mix @ noise(step, p.numel())).view(shape)
                _, s = rule(p, g, s, torch.tensor(step, dtype=F64), values)
        return s

    def test_pairs_of_weights_as_xmat(self):
        pair = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)
        covariance = torch.diag(torch.tensor([0.0, 0.25, 0.0, 4.0, 0.0], dtype=F64))
        covariance[2, 2] = 9.0
        for here, there in ((0, 4), (1, 3)):
            at = torch.tensor([here, there])
            covariance[at[:, None], at] = pair * (1 if here == 0 else 16)
        s = self.fit("psgdxmat", torch.linalg.cholesky(covariance), (5,))
        q = torch.diag(s["a"]) + torch.diag(s["b"]).fliplr()
        assert far(q.mT @ q, inverse_root(covariance)) < 0.06

    def test_a_direction_of_the_whole_model_as_lra(self):
        d = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0, 1.0], dtype=F64)
        u = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0, 2.0], dtype=F64)
        covariance = torch.outer(d, d) * (torch.eye(6, dtype=F64) + torch.outer(u, u))
        s = self.fit("psgdlra", torch.linalg.cholesky(covariance), (6,))
        q = (torch.eye(6, dtype=F64) + s["u"] @ s["v"].mT) * s["d"]
        assert far(q.mT @ q, inverse_root(covariance)) < 0.1

    def test_rows_and_columns_as_kron(self):
        left = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
        right = torch.tensor([[1.0, 0.6, 0.0], [0.6, 2.0, 0.3], [0.0, 0.3, 0.5]], dtype=F64)
        covariance = torch.kron(left, right)
        s = self.fit("psgdkron", torch.linalg.cholesky(covariance), (2, 3))
        first, second = (x.view(n, n) for x, n in zip(s["q"].split([4, 9]), (2, 3), strict=True))
        for q in (first, second):
            assert torch.equal(q, q.triu()) and (q.diagonal() > 0).all()
        p = torch.kron(first.mT @ first, second.mT @ second)
        assert far(p, inverse_root(covariance)) < 0.1


class TestInvariance:
    @each
    def test_the_unit_of_the_loss_does_not_matter(self, name):
        grads = [noise(k, 3, 2) for k in range(1, 20)]
        given = {"lr": 0.1, "momentum": 0.5}
        one, _ = run(name, grads, (3, 2), damping=1e-3, **given)
        big, _ = run(name, [1e3 * g for g in grads], (3, 2), damping=1.0, **given)
        torch.testing.assert_close(big, one, rtol=1e-9, atol=1e-9)

    def test_dimensions_of_one_do_not_matter_to_kron(self):
        grads = [noise(k, 3, 2) for k in range(1, 8)]
        flat, _ = run("psgdkron", grads, (3, 2))
        long, _ = run("psgdkron", [g.view(1, 3, 1, 2) for g in grads], (1, 3, 1, 2))
        torch.testing.assert_close(long.view(3, 2), flat, rtol=0, atol=0)

    def test_balancing_keeps_the_product(self):
        u, v = noise(0, 20, 10), 3 * noise(1, 20, 10)
        a, b = _balanced(u, v)
        torch.testing.assert_close(a @ b.mT, u @ v.mT, rtol=1e-12, atol=1e-12)
        gaps = []
        for _ in range(2000):
            gaps.append(torch.linalg.norm(u.mT @ u - v.mT @ v))
            u, v = _balanced(u, v)
        assert gaps[-1] < 1e-3 * gaps[0]


class TestRandomness:
    @each
    def test_another_seed_is_another_path_and_the_same_is_the_same(self, name):
        grads = [noise(k, 3, 2) for k in range(1, 8)]
        one, again, other = (run(name, grads, (3, 2), lr=0.1, seed=k)[0] for k in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.allclose(one, other, rtol=1e-3)

    def test_a_step_of_lra_moves_either_u_or_v(self):
        rule = RULES["psgdlra"]
        values, p, moved = rule.values(), torch.zeros(6, dtype=F64), {"u": 0, "v": 0}
        s = rule.init(p, values)
        for step in range(1, 41):
            before = s
            p, s = rule(p, noise(step, 6), s, torch.tensor(step, dtype=F64), values)
            for n in moved:
                moved[n] += not torch.equal(s[f"smoothness_{n}"], before[f"smoothness_{n}"])
        assert sum(moved.values()) == 40 and min(moved.values()) > 10


class TestStep:
    @each
    def test_clips_the_root_mean_square_and_then_entries(self, name):
        g = torch.tensor([[10.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=F64)
        loose, _ = run(name, [g], (3, 2), lr=1.0, clip_rms=1e9, clip_entry=1e9)
        rms = loose.square().mean().sqrt()
        tight, _ = run(name, [g], (3, 2), lr=1.0, clip_rms=float(rms) / 2, clip_entry=1e9)
        torch.testing.assert_close(tight, loose / 2)
        both, _ = run(name, [g], (3, 2), lr=1.0, clip_rms=float(rms) / 2, clip_entry=0.1)
        torch.testing.assert_close(both, (loose / 2).clamp(-0.1, 0.1))

    def test_a_parameter_whose_first_gradient_is_late_begins_then(self):
        early, late = (torch.nn.Parameter(noise(k, 2, 3)) for k in (0, 1))
        optimizer = torch_form(RULES["psgdkron"])([early, late], lr=0.1)
        for step in range(6):
            early.grad = noise(step, 2, 3)
            late.grad = noise(step + 9, 2, 3) if step > 2 else None
            optimizer.step()
        assert late.isfinite().all() and not torch.equal(late, noise(1, 2, 3))

    def test_memory_is_as_declared(self):
        unit = Layout.alone(torch.Size([3, 1, 5]))
        assert RULES["psgdkron"].slot_shape("q", unit) == (9 + 25,)
        assert RULES["psgdkron"].slot_shape("q", Layout.alone(torch.Size([7]))) == (7,)
        assert RULES["psgdlra"].slot_shape("u", unit) == (15, 10)

    @pytest.mark.parametrize("name", ["psgdkron", "shampoo", "scalableshampoo"])
    def test_does_not_see_how_memory_is_laid_out(self, name):
        rule, values = RULES[name], RULES[name].values()
        ends = []
        for layout in (torch.contiguous_format, torch.channels_last):
            p = noise(0, 2, 3, 2, 2).contiguous(memory_format=layout)
            s = rule.init(p, values)
            for step in range(1, 8):
                g = noise(step, 2, 3, 2, 2).contiguous(memory_format=layout)
                p, s = rule(p, g, s, torch.tensor(step, dtype=F64), values)
            ends.append(p)
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
