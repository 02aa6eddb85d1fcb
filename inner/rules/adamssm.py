"""AdamSSM: Adam whose second moment passes one more pole and zero. A reconstruction.

After Chakrabarti & Chopra 2022, arXiv:2206.02034, who put a pole-zero pair into the transfer
function from the squared gradient to the second moment. Their coefficients, defaults and correction
of bias were not at hand, so this is our recursion of that structure, not theirs: on top of Adam's
average u, with gain 1 for a constant input,

    v <- pole * v + (1 - pole) / (1 - zero) * (u - zero * u_before)

and v is divided by what the same recursion makes of ones. zero = pole is Adam; zero = beta2 leaves
a single pole. v stays >= 0 for every gradient if and only if zero <= max(beta2, pole), which is
checked, and in the search ranges always so. The defaults are ours.
"""

import torch

from ..core.hyper import decay, learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import shared, zeros
from ..numerics.elementwise import root


def second_moment_stays_positive(values):
    """The condition under which no sequence of gradients makes the second moment negative; of
    several values of each, the worst.
    """
    zero, pole, beta2 = (
        torch.as_tensor(values[n], dtype=torch.float64) for n in ("zero", "pole", "beta2")
    )
    if zero.max() > torch.maximum(pole.min(), beta2.min()):
        return "zero must be <= max(beta2, pole), or the second moment can become negative"
    return None


@rule(
    "AdamSSM",
    slots={"m": zeros, "u": zeros, "v": zeros, "u_of_ones": shared(0.0), "v_of_ones": shared(0.0)},
    check=second_moment_stays_positive,
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    pole=decay(0.9, search=(0.5, 0.999)),
    zero=decay(0.5, search=(0.01, 0.5)),
    eps=positive(1e-8, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
)
def adamssm(p, g, s, t, lr, beta1, beta2, pole, zero, eps, weight_decay):
    g = g + weight_decay * p

    def passed(square, u, v):
        new = (1 - beta2) * square
        # u_new - zero * u, without cancellation where zero <= beta2.
        lead = (beta2 - zero) * u + new
        return beta2 * u + new, pole * v + (1 - pole) / (1 - zero) * lead

    m = beta1 * s["m"] + (1 - beta1) * g
    u, v = passed(g * g, s["u"], s["v"])
    u_of_ones, v_of_ones = passed(1, s["u_of_ones"], s["v_of_ones"])
    step = m / (1 - beta1**t) / (root(v / v_of_ones) + eps)
    return p - lr * step, {
        "m": m,
        "u": u,
        "v": v,
        "u_of_ones": u_of_ones,
        "v_of_ones": v_of_ones,
    }
