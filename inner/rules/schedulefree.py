"""Schedule-free training: an average of the iterates in place of a falling learning rate.

Defazio et al. 2024, arXiv:2405.15682.
"""

import torch

from ..core.hyper import Integer, decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import shared, weights, zeros
from ..numerics.elementwise import root


def average_can_be_read(values):
    """With no interpolation the gradient is taken at z, which does not tell the average."""
    name = "momentum" if "momentum" in values else "beta1"
    if torch.as_tensor(values[name]).min() == 0:
        return f"{name} must be > 0: the average is read from where gradients are taken"
    return None


def stepped(p, d, s, t, lr, beta, r, weight_lr_power):
    """The weights p, at which gradients are taken, and the slots, after a step of lr * d."""
    lr_max = torch.maximum(s["lr_max"], lr)
    weight = t**r * lr_max**weight_lr_power
    total = s["weight_sum"] + weight
    # A warm-up may begin at lr = 0, where there is nothing to average yet.
    share = weight / torch.where(total > 0, total, 1.0)
    p = p + share * (s["z"] - p) + lr * (beta * (1 - share) - 1) * d
    return p, {"z": s["z"] - lr * d, "lr_max": lr_max, "weight_sum": total}


def average(p, z, beta):
    """The average x, of which p is (1 - beta) * z + beta * x."""
    return z + (p - z) / beta


def _of_sgd(p, s, values, layout):
    return average(p, s["z"], values["momentum"])


def _of_adamw(p, s, values, layout):
    return average(p, s["z"], values["beta1"])


@rule(
    "ScheduleFreeSGD",
    slots={"z": weights, "lr_max": shared(0.0), "weight_sum": shared(0.0)},
    readout=_of_sgd,
    check=average_can_be_read,
    lr=learning_rate(1.0, search=(1e-3, 1e2)),
    momentum=decay(0.9),
    weight_decay=weight_decay(0.0),
    r=positive(0.0, search=(0.01, 10.0), start=0.1),
    weight_lr_power=Integer(2, 0, 8),
)
def schedulefreesgd(p, g, s, t, lr, momentum, weight_decay, r, weight_lr_power):
    """Schedule-free SGD. Defazio et al. 2024, arXiv:2405.15682.

    As the authors' code (facebookresearch/schedule_free): an iterate z takes the steps, x is its
    average, and gradients are taken between them, at (1 - momentum) * z + momentum * x, which are
    the weights here; x is what to use, and is computed from the two. z counts in it by
    t**r * (largest lr so far)**weight_lr_power, so that a warm-up counts little. Weight decay is by
    the weights here. The authors' warmup_steps are left out: lr takes any schedule, per step.

    With a constant lr the power does nothing. momentum must not be 0 (x could not be computed),
    and where it moves during training, so does x.
    """
    return stepped(p, g + weight_decay * p, s, t, lr, momentum, r, weight_lr_power)


@rule(
    "ScheduleFreeAdamW",
    slots={"z": weights, "v": zeros, "lr_max": shared(0.0), "weight_sum": shared(0.0)},
    readout=_of_adamw,
    check=average_can_be_read,
    lr=learning_rate(2.5e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    r=positive(0.0, search=(0.01, 10.0), start=0.1),
    weight_lr_power=Integer(2, 0, 8),
)
def schedulefreeadamw(p, g, s, t, lr, beta1, beta2, eps, weight_decay, r, weight_lr_power):
    """Schedule-free AdamW. Defazio et al. 2024, arXiv:2405.15682.

    schedulefreesgd, said there, with the gradient divided by the root of its second moment and
    beta1 for momentum. Weight decay is added to the divided gradient, and so decoupled.
    """
    v = beta2 * s["v"] + (1 - beta2) * g * g
    d = g / (root(v / (1 - beta2**t)) + eps) + weight_decay * p
    p, slots = stepped(p, d, s, t, lr, beta1, r, weight_lr_power)
    return p, {**slots, "v": v}
