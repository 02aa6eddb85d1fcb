"""Metagradients through what real models are made of, against finite differences, in float64.

BatchNorm, dropout, attention by itself, an LSTM, frozen and tied parameters are in test_replay.
The points are chosen as there; where a model has kinks (max pooling), no difference crosses one.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.inner.schedules.schedule import find_schedule
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.training.finite_differences import directional_difference, held_out_loss
from hyperdescent.meta.training.loop import run_training
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.problems import load_problem

DOUBLE = torch.float64
STEPS = 10
VALUES = {
    "adamw": {"lr": 0.01, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.01},
}
NAMES = {"adamw": ["lr", "beta2"], "sgd": ["lr", "momentum"]}
BY_AUTOGRAD = Replay(compile=False)


def mean_loss(output, target):
    """Cross-entropy per example, or per token of every example."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def labelled(inputs, generator):
    target = inputs.flatten(1)[:, :3].argmax(1)
    noisy = torch.rand(len(inputs), generator=generator) < 0.2
    return inputs, torch.where(noisy, (target + 1) % 3, target)


def vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return labelled(torch.randn(count, 5, dtype=DOUBLE, generator=generator), generator)


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return labelled(torch.randn(count, 1, 8, 8, dtype=DOUBLE, generator=generator), generator)


def tokens(count, seed=0):
    """Sequences of six of 0 to 6, each with the one that comes next at every place; 7 never is."""
    generator = torch.Generator().manual_seed(seed)
    jumps = 1 + (torch.rand(count, 7, generator=generator) < 0.3).long()
    jumps[:, 0] = torch.randint(7, (count,), generator=generator)
    sequence = jumps.cumsum(1) % 7
    return sequence[:, :-1], sequence[:, 1:]


def problem(make, examples=vectors, loss_fn=mean_loss, **options):
    options = {"train": examples(32), "batch_size": 8, **options}
    return problem_from_module(
        lambda: make().double(), loss_fn, valid=examples(24, seed=1), **options
    )


def training(made, rule="adamw", **options):
    return Training(made, find_rule(rule), STEPS, values=VALUES[rule], **options)


def assert_exact(run, names, *, h=5e-4):
    """The derivative in every hyper alone, per unit of its unconstrained coordinate."""
    point = run.start(names)
    estimate, _ = BY_AUTOGRAD(run, point, seed=0)
    assert estimate.ok, estimate.note.reason
    # Without a graph torch may take another kernel.
    assert estimate.loss == pytest.approx(float(held_out_loss(run, point, 0)), rel=1e-14)
    for name, value in point.items():
        free = run.hypers[name].free(value).requires_grad_()
        (slope,) = torch.autograd.grad(run.hypers[name].value(free).sum(), free)
        direction = {n: slope if n == name else torch.zeros_like(v) for n, v in point.items()}
        expected = directional_difference(run, point, direction, seed=0, h=h)
        assert expected != 0, f"{name} does not move the loss"
        exact = float((estimate.grad[name] * slope).sum())
        assert exact == pytest.approx(expected, rel=1e-7), name


def between(norm):
    return nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Linear(8, 3))


def pooled():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


class Words(nn.Module):
    """Guesses the next token from this one."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.rows(x)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        split = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.after(x))


class GPT(nn.Module):
    """Learned positions, causal attention, normalized before; the head is the embedding."""

    def __init__(self, layers=2, width=16, heads=2, words=8, length=6):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.2)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        hidden = self.embedding(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


class Recurrent(nn.Module):
    """Five numbers as a sequence of five."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(1, 3, batch_first=True, **options)
        self.head = nn.Linear(6 if options.get("bidirectional") else 3, 3)

    def forward(self, x):
        return self.head(self.cell(x.unsqueeze(-1))[0].mean(1))


class Encoder(nn.Module):
    """torch's own layer, which takes another path where it is not trained."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.1, activation="gelu", batch_first=True
        )

    def forward(self, x):
        return self.head(self.layer(self.up(x.unsqueeze(-1))).mean(1))


MODELS = {
    "GroupNorm": (lambda: between(nn.GroupNorm(2, 8)), vectors),
    "LayerNorm": (lambda: between(nn.LayerNorm(8)), vectors),
    "RMSNorm": (lambda: between(nn.RMSNorm(8)), vectors),
    "pooling": (pooled, images),
    "embedding": (Words, tokens),
    "GPT": (GPT, tokens),
    "encoder": (Encoder, vectors),
    "GRU": (lambda: Recurrent(nn.GRU), vectors),
    "deep LSTM": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), vectors),
}


@pytest.mark.parametrize("rule", VALUES)
@pytest.mark.parametrize(("make", "examples"), MODELS.values(), ids=MODELS)
def test_exact(make, examples, rule):
    assert_exact(training(problem(make, examples), rule), NAMES[rule])


@pytest.mark.parametrize(("make", "examples"), MODELS.values(), ids=MODELS)
def test_forward_mode_is_exact(make, examples):
    run = training(problem(make, examples, accumulate=2))
    point = run.start(NAMES["adamw"])
    expected, _ = BY_AUTOGRAD(run, point, seed=0)
    found, _ = Forward(compile=False)(run, point, seed=0)
    if make is Encoder:  # Its dropout is of a transposed tensor.
        assert found.note.outcome is Outcome.NOT_DIFFERENTIABLE
        assert "draw other numbers" in found.note.reason
        return
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    for name, value in expected.grad.items():
        assert float(found.grad[name]) == pytest.approx(float(value), rel=1e-9), name


@pytest.mark.parametrize("name", ["RMSNorm", "encoder"])
def test_traced_steps_are_the_same(name):
    """Dropout included, of transposed tensors too."""
    run = training(problem(*MODELS[name]))
    point = run.start(NAMES["adamw"])
    expected, _ = BY_AUTOGRAD(run, point, seed=0)
    found, _ = Replay(compile="trace")(run, point, seed=0)
    assert found.note.how.endswith("traced")
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    for name, value in expected.grad.items():
        assert float(found.grad[name]) == pytest.approx(float(value), rel=1e-9), name


def test_tied_weights_are_one_parameter():
    names = training(problem(GPT, tokens)).layout.names
    assert "embedding.weight" in names and "head.weight" not in names


def test_a_row_that_is_never_used_has_no_share():
    """At eps = 1e-8 as well, where its second moment is 0."""
    made = problem(Words, tokens)
    run = Training(made, find_rule("adamw"), STEPS, values={"weight_decay": 0.0})
    state = run_training(run, run.resolve({}), 0).state
    rows, start = run.layout.unflatten(state.p)["rows.weight"], made.start(0)[0]["rows.weight"]
    assert torch.equal(rows[7], start[7]) and not (rows[:7] == start[:7]).any()
    point = {name: run.defaults()[name] for name in ("lr", "beta1", "beta2", "eps")}
    estimate, _ = BY_AUTOGRAD(run, point, seed=0)
    assert estimate.ok, estimate.note.reason


def test_a_schedule_through_a_gpt():
    spec = find_schedule("warmup_stable_decay:cosine")
    assert_exact(training(problem(GPT, tokens), schedules={"lr": spec}), ["lr.peak"])


def batch_normed():
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def normed():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def loader(examples=vectors, count=32, **options):
    return DataLoader(TensorDataset(*examples(count)), **{"batch_size": 8, **options})


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


def penalized(output, target, *, hypers, params):
    return mean_loss(output, target) + hypers["l2"] / 2 * sum(
        p.square().sum() for p in params.values()
    )


class TestAccumulation:
    @pytest.mark.parametrize("rule", VALUES)
    def test_exact(self, rule):
        assert_exact(training(problem(batch_normed, accumulate=2), rule), NAMES[rule])

    def test_exact_with_frozen_parameters(self):
        assert_exact(training(problem(Frozen, accumulate=4)), ["lr", "beta1"])

    def test_exact_in_a_hyper_of_the_loss(self):
        made = problem(
            batch_normed,
            loss_fn=penalized,
            hypers={"l2": positive(1e-2, search=(1e-6, 1.0))},
            outer_loss_fn=mean_loss,
            accumulate=2,
        )
        assert_exact(training(made), ["l2", "lr"])

    @pytest.mark.parametrize(
        ("model", "graphs"),
        [("LayerNorm", "keep"), ("LayerNorm", "recompute"), ("GPT", "recompute")],
    )
    def test_is_the_whole_batch_where_examples_do_not_meet(self, model, graphs):
        names = ["lr", "beta1", "beta2", "weight_decay"]
        found = []
        for accumulate in (1, 2, 8):
            run = training(problem(*MODELS[model], accumulate=accumulate))
            estimate, _ = Replay(compile=False, graphs=graphs)(run, run.start(names), seed=0)
            found.append([estimate.loss, *(float(estimate.grad[n]) for n in names)])
        assert found[1] == pytest.approx(found[0], rel=1e-12)
        assert found[2] == pytest.approx(found[0], rel=1e-12)

    def test_is_the_whole_batch_at_an_optimum_too(self):
        found = []
        for accumulate in (1, 4):
            made = problem(
                lambda: nn.Linear(5, 3),
                loss_fn=penalized,
                hypers={"l2": positive(0.1, search=(1e-6, 1.0))},
                outer_loss_fn=mean_loss,
                batch_size=32,
                accumulate=accumulate,
            )
            run = Training(made, find_rule("sgd"), 100, values={"lr": 1.0})
            estimate, _ = Implicit()(run, run.start(["l2"]), seed=0)
            assert estimate.ok, estimate.note.reason
            found.append(float(estimate.grad["l2"]))
        assert found[1] == pytest.approx(found[0], rel=1e-9)

    def test_is_what_torch_would_do(self):
        """Statistics of one part after the other, and the gradient of loss / parts added up."""
        made = problem(normed, train=loader(), batch_size=None, accumulate=2)
        run = training(made)
        state = run_training(run, run.resolve({}), 0).state
        model = normed().double()
        params, buffers = made.start(0)
        model.load_state_dict({**params, **buffers})
        of = VALUES["adamw"]
        torchs = torch.optim.AdamW(
            model.parameters(),
            lr=of["lr"],
            betas=(of["beta1"], of["beta2"]),
            eps=of["eps"],
            weight_decay=of["weight_decay"],
        )
        for step in range(STEPS):
            torchs.zero_grad()
            for inputs, target in zip(*(x.split(4) for x in made.batch(step, 0)), strict=True):
                (mean_loss(model(inputs), target) / 2).backward()
            torchs.step()
        for name, p in run.layout.unflatten(state.p).items():
            assert torch.allclose(p, model.state_dict()[name], rtol=1e-12, atol=1e-14), name
        for name, buffer in state.buffers.items():
            assert torch.allclose(buffer, model.state_dict()[name], rtol=1e-12, atol=1e-14), name
        assert int(state.buffers["1.num_batches_tracked"]) == 2 * STEPS


class TestStream:
    @pytest.mark.parametrize("rule", VALUES)
    def test_exact(self, rule):
        made = problem(batch_normed, train=loader(shuffle=True), batch_size=None)
        assert_exact(training(made, rule), NAMES[rule])

    def test_exact_where_batches_differ_in_size(self):
        made = problem(batch_normed, train=loader(count=30), batch_size=None)
        assert len(made.batch(3, 0)[1]) == 6
        assert_exact(training(made), ["lr"])

    def test_another_seed_is_another_start_on_the_same_batches(self):
        made = problem(pooled, images, train=loader(images, shuffle=True), batch_size=None)
        run = training(made)
        one, two = (BY_AUTOGRAD(run, run.start(["lr"]), seed=seed)[0] for seed in (0, 1))
        assert one.loss != two.loss
        again, _ = BY_AUTOGRAD(run, run.start(["lr"]), seed=0)
        assert again.loss == one.loss and torch.equal(again.grad["lr"], one.grad["lr"])


class TestMixedPrecision:
    """How far a metagradient in bfloat16 can be trusted: its direction, over tens of steps.

    Every activation is off by 2**-9 of itself. The metagradient's error is larger by what training
    makes of such a change of its path, which grows with the rate and the number of steps.
    """

    @pytest.mark.parametrize(("name", "cosine"), [("digits-mlp", 0.99), ("digits-cnn", 0.95)])
    def test_the_direction_of_a_schedule(self, name, cosine):
        single = load_problem(name)
        found = []
        for made in (single, dataclasses.replace(single, autocast=torch.bfloat16)):
            run = Training(
                made,
                find_rule("adamw"),
                50,
                schedules={"lr": find_schedule("piecewise:5")},
                values={"lr": 0.01},
            )
            point = run.start(["lr"])
            estimate, _ = BY_AUTOGRAD(run, point, seed=0)
            assert estimate.ok, estimate.note.reason
            found.append((estimate.loss, estimate.grad["lr.knots"] * point["lr.knots"]))
        (loss, exact), (low_loss, low) = found
        assert low_loss != loss and low_loss == pytest.approx(loss, rel=0.1)
        assert float(F.cosine_similarity(exact, low, dim=0)) > cosine

    def test_of_a_gpt(self):
        found = []
        for autocast in (None, torch.bfloat16):
            made = problem_from_module(
                GPT, mean_loss, tokens(32), tokens(24, seed=1), batch_size=8, autocast=autocast
            )
            run = training(made, schedules={"lr": find_schedule("piecewise:5")})
            point = run.start(["lr"])
            found.append(BY_AUTOGRAD(run, point, seed=0)[0].grad["lr.knots"] * point["lr.knots"])
        assert float(F.cosine_similarity(*found, dim=0)) > 0.9
