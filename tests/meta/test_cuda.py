"""Every route to a metagradient on CUDA, beside autograd on the CPU, in float64.

Sums are taken in another order there, so the numbers agree but for rounding. What draws on the GPU
has other draws than on the CPU: it is compared with autograd on the GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from nets import examples, mlp
from torch import nn

import hyperdescent as hd
from hyperdescent.inner.core.hyper import positive
from hyperdescent.inner.registry import find_rule
from hyperdescent.meta.forward.forward import Forward
from hyperdescent.meta.implicit.implicit import Implicit
from hyperdescent.meta.implicit.linear_solvers import conjugate_gradient
from hyperdescent.meta.problems.module_problem import problem_from_module
from hyperdescent.meta.reverse.memory_budget import available
from hyperdescent.meta.reverse.replay import Replay
from hyperdescent.meta.tracing.cuda_graph import captured
from hyperdescent.meta.tracing.step_graph import trace
from hyperdescent.meta.tracing.torchscript import scripted
from hyperdescent.meta.training.outcome import Outcome
from hyperdescent.meta.training.training import Training
from hyperdescent.studies.benchmarks.workloads import GPT, mean_loss

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # What inductor loads when it is first used is told so by the rest of torch.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]

STEPS = 8
GIVEN = {"lr": 0.03, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
# Relative; rounding is 1e-16 and grows a few orders over the steps.
TOLERANCE = 1e-9

# A route, and what its note has to end with: anything behind that is why it was not taken.
ROUTES = {
    "autograd": (Replay(compile=False), "by autograd"),
    "traced": (Replay(compile="trace"), "traced"),
    "compiled": (Replay(compile=True), "compiled"),
    "lean": (Replay(compile=True, graphs="recompute", checkpoints=3), "compiled"),
    "host": (Replay(compile=False, graphs="recompute", checkpoints=3, store="cpu"), "by autograd"),
    "host, compiled": (Replay(compile=True, checkpoints=3, store="cpu"), "compiled"),
    "forward": (Forward(compile=False), "by autograd"),
    "forward, compiled": (Forward(compile=True), "compiled"),
}


def group_norm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def batch_norm():
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    return nn.Sequential(*layers)


def dropout():
    return nn.Sequential(*batch_norm()[:4], nn.Dropout(0.3), nn.Linear(48, 3))


def gpt():
    return GPT(1, 8, 2)


def tokens(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(65, (count, 9), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


MODELS = {
    "mlp": (mlp, examples, (5,)),
    "group norm": (group_norm, examples, (1, 6, 6)),
    "batch norm": (batch_norm, examples, (1, 6, 6)),
    "dropout": (dropout, examples, (1, 6, 6)),
    "gpt": (gpt, tokens, ()),
}


def training(name, device, dtype=torch.float64, **options):
    make, draw, shape = MODELS[name]
    parts = [draw(count, *shape, seed=seed) for seed, count in enumerate((40, 30))]
    train, valid = ((x.to(dtype) if x.is_floating_point() else x, y) for x, y in parts)
    problem = problem_from_module(
        lambda: make().to(device, dtype), mean_loss, train, valid, batch_size=10, **options
    )
    return Training(problem, find_rule("adam"), STEPS, values=GIVEN)


def answer(route, run):
    estimator, said = ROUTES[route]
    estimate, _ = estimator(run, run.start([*GIVEN]), seed=3)
    assert estimate.ok, estimate.note.reason
    assert estimate.note.how.endswith(said), estimate.note.how
    return estimate


def assert_agree(found, expected, rel=TOLERANCE):
    assert found.loss == pytest.approx(expected.loss, rel=rel)
    assert set(found.grad) == set(expected.grad)
    for name, slope in expected.grad.items():
        assert found.grad[name].tolist() == pytest.approx(slope.tolist(), rel=rel), name


@pytest.fixture(scope="module")
def references():
    """By autograd, on the CPU where nothing is drawn on the GPU."""
    devices = {name: "cuda" if name == "dropout" else "cpu" for name in MODELS}
    return {name: answer("autograd", training(name, device)) for name, device in devices.items()}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", MODELS)
def test_agrees(model, route, references):
    if model == "dropout" and isinstance(ROUTES[route][0], Forward):
        pytest.skip("of other draws, and refused: see below")
    assert_agree(answer(route, training(model, "cuda")), references[model])


@pytest.mark.parametrize("compile", [False, True])
def test_forward_mode_through_dropout_is_refused(compile):
    # torch.func has draws of its own for it on a GPU.
    run = training("dropout", "cuda")
    estimate, _ = Forward(compile=compile)(run, run.start([*GIVEN]), seed=3)
    assert estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE
    assert "its steps draw other numbers" in estimate.note.reason


@pytest.mark.parametrize("route", ["traced", "compiled", "forward, compiled"])
@pytest.mark.parametrize("model", ["mlp", "group norm", "batch norm", "gpt"])
def test_float32_is_not_refused(model, route):
    found = answer(route, training(model, "cuda", torch.float32))
    expected = answer("autograd", training(model, "cuda"))
    # Convolutions in TF32, torch's default, have 10 bits.
    assert_agree(found, expected, rel=0.1)


@pytest.mark.parametrize("route", ["autograd", "traced", "compiled"])
def test_bfloat16_is_not_refused(route):
    made = training("gpt", "cuda", torch.float32, autocast=torch.bfloat16)
    assert_agree(answer(route, made), answer("autograd", training("gpt", "cuda")), rel=0.2)


@pytest.mark.parametrize("route", ["autograd", "traced", "compiled"])
@pytest.mark.parametrize("model", ["mlp", "dropout"])
def test_a_seed_repeats_bit_for_bit(model, route, monkeypatch):
    # What torch asks for where it promises that.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    before = torch.cuda.get_rng_state()
    first, again = (answer(route, training(model, "cuda")) for _ in range(2))
    assert first.loss == again.loss
    assert all(torch.equal(first.grad[name], again.grad[name]) for name in first.grad)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_traced_operations_are_not_fused():
    run = training("mlp", "cuda", torch.float32)
    values = run.resolve(run.start([*GIVEN])).detach().at(0)
    step = trace(run, run.begin(values, 3), values, [*GIVEN], 3)
    graph = step.advance()
    count = len(graph.graph.find_nodes(op="placeholder"))
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.rand(x.shape, generator=draw).to(x.device, x.dtype) for x in step.takes[:count]]
    interpreted = scripted(graph)
    with torch.no_grad():
        expected = graph(*inputs)
        for _ in range(4):  # It is the second or third call that would be optimized.
            assert all(map(torch.equal, interpreted(*inputs), expected))


def test_what_a_step_returns_is_never_written_again():
    kept = captured(lambda x, y: (x + y, x * y))
    made = [kept(*(torch.full((3,), float(k), device="cuda") for _ in range(2))) for k in range(5)]
    for k, (total, product) in enumerate(made):
        assert total.tolist() == [2 * k] * 3 and product.tolist() == [k * k] * 3


def test_what_waits_for_the_gpu_is_called_as_it_is():
    waits = captured(lambda x: (x * float(x.sum()),))
    x = torch.arange(3.0, device="cuda")
    assert [waits(x + k)[0].tolist() for k in range(2)] == [[0, 3, 6], [6, 12, 18]]


def test_hypergradient_agrees(references):
    made = training("mlp", "cuda").problem
    options = {"learn": [*GIVEN], "steps": STEPS, "values": GIVEN, "seed": 3}
    found = hd.hypergradient(made, "adam", **options)
    assert_agree(found, references["mlp"])


def ridge(device):
    """Linear, with a penalty that makes it strictly convex."""

    def penalized(output, target, *, hypers, params):
        penalty = sum((p * p).sum() for p in params.values())
        return F.cross_entropy(output, target) + hypers["l2"] / 2 * penalty

    problem = problem_from_module(
        lambda: nn.Linear(5, 3).to(device, torch.float64),
        penalized,
        examples(40, 5),
        examples(30, 5, seed=1),
        batch_size=40,
        hypers={"l2": positive(0.1, search=(1e-6, 1.0))},
        outer_loss_fn=F.cross_entropy,
    )
    return Training(problem, find_rule("sgd"), 300, values={"lr": 0.5})


def test_implicit_by_conjugate_gradients_agrees():
    estimator = Implicit(solve=conjugate_gradient(steps=30))
    found, expected = (
        estimator(run, run.start(["l2"]), seed=0)[0] for run in map(ridge, ("cuda", "cpu"))
    )
    assert found.ok and found.note.residual < TOLERANCE
    assert_agree(found, expected)


class TestMemory:
    def test_what_torch_holds_for_later_is_free(self):
        device = torch.device("cuda")
        before = available(device)
        torch.empty(2**28, dtype=torch.uint8, device=device)
        # The context's own may have grown meanwhile.
        assert available(device) == pytest.approx(before, rel=0.01)
        assert torch.cuda.memory_reserved() >= 2**28
