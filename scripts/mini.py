"""The whole idea in one file: learn Adam's schedule and betas by their own gradient.

Train, keeping every state. Then walk back: do one step again with a graph, pull the gradient of
the held-out loss through it, go on to the step before. What arrives at the hyperparameters is
exact, and no graph was ever longer than one step. Everything else in hyperdescent makes this
general, fast, safe or comfortable. Run it: python scripts/mini.py
"""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

STEPS, KNOTS, META_STEPS = 60, 8, 30


# 1. The task: an MLP on digits, its weights one flat vector.
x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
TRAIN, VALID = ((x[part].float() / 16, y[part]) for part in (order[:900], order[900:1350]))
SHAPES = [(64, 48), (48,), (48, 10), (10,)]


SIZES = [torch.Size(s).numel() for s in SHAPES]


def start(seed):
    draw = torch.Generator().manual_seed(seed)
    return 0.15 * torch.randn(sum(SIZES), generator=draw)


def loss(w, data):
    w1, b1, w2, b2 = (part.view(s) for part, s in zip(w.split(SIZES), SHAPES, strict=True))
    x, y = data
    # A smooth activation: the exact gradient of a path with kinks says little about the next path.
    return cross_entropy(torch.tanh(x @ w1 + b1) @ w2 + b2, y)


def batch(step, seed):
    # A pure function of seed and step, so that going back sees the same examples.
    draw = torch.Generator().manual_seed(1000 * seed + step)
    chosen = torch.randint(len(TRAIN[0]), (64,), generator=draw)
    return TRAIN[0][chosen], TRAIN[1][chosen]


# 2. The rule: Adam as a pure function, differentiable in its hyperparameters.
def root(v):
    # Pixels that are always 0 give weights with v = 0, where the true slope of sqrt is infinite.
    return torch.where(v == 0, 0.0, torch.where(v == 0, 1.0, v).sqrt())


def adam(state, g, t, lr, beta1, beta2):
    w, m, v = state
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return w - lr * (m / (1 - beta1**t)) / (root(v / (1 - beta2**t)) + 1e-8), m, v


def values(z):
    """lr at every step (knots joined by lines in log), beta1, beta2 from unconstrained numbers."""
    lines = torch.nn.functional.interpolate(z[None, None, :KNOTS], STEPS, mode="linear")
    return [*lines.flatten().exp(), *z[KNOTS:].sigmoid()]


# 3. Training, once more with a graph for a single step, and the way back.
def step(state, t, seed, graph, lr, beta1, beta2):
    w = state[0] if graph else state[0].detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(w, batch(t, seed)), w, create_graph=graph)
    return adam((w, *state[1:]), g, t, lr, beta1, beta2)


def metagradient(z, seed):
    """(held-out loss, its exact gradient in z)."""
    z = z.detach().requires_grad_()
    hypers = values(z)
    fixed = [h.detach() for h in hypers]
    states = [(start(seed), *torch.zeros(2, sum(SIZES)))]
    for t in range(1, STEPS + 1):
        hyper = (fixed[t - 1], *fixed[STEPS:])
        states.append(tuple(x.detach() for x in step(states[-1], t, seed, False, *hyper)))
    w = states[-1][0].requires_grad_()
    held_out = loss(w, VALID)
    adjoint = (torch.autograd.grad(held_out, w)[0], *map(torch.zeros_like, states[-1][1:]))
    bars = [torch.zeros(()) for _ in hypers]
    for t in range(STEPS, 0, -1):
        used = (t - 1, STEPS, STEPS + 1)
        before = [x.detach().requires_grad_() for x in (*states[t - 1], *(fixed[i] for i in used))]
        after = step(before[:3], t, seed, True, *before[3:])
        grads = torch.autograd.grad(after, before, adjoint)
        adjoint = grads[:3]
        for i, grad in zip(used, grads[3:], strict=True):
            bars[i] = bars[i] + grad
    return held_out.item(), torch.autograd.grad(hypers, z, bars)[0]


# 4. Descend it: Adam again, on the unconstrained numbers, a new training seed every time.
def tune():
    z = torch.cat([torch.full((KNOTS,), 1e-3).log(), torch.tensor([0.9, 0.99]).logit()])
    state, losses = (z, *torch.zeros(2, len(z))), []
    for k in range(1, META_STEPS + 1):
        held_out, g = metagradient(state[0], seed=k)
        state = adam(state, g, torch.tensor(float(k)), 0.3 * (1 - k / META_STEPS), 0.8, 0.95)
        losses.append(held_out)
        if k % 5 == 0:
            print(f"metagradient {k:3}: held-out loss {held_out:.4f}")
    return state[0], losses


if __name__ == "__main__":
    learned = values(tune()[0])
    print("learning rate:", *(f"{lr:.4f}" for lr in learned[: STEPS : STEPS // KNOTS]))
    print("beta1 {:.4f}, beta2 {:.4f}".format(*learned[STEPS:]))
