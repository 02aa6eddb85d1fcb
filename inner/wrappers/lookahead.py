"""Lookahead: k steps forward, one step back. Zhang et al. 2019, arXiv:1907.08610, Algorithm 1.

Every k steps slow weights move a share alpha of the way to the weights, and these start from there
again. The slots of the rule inside are left as they are, the authors' default. The weights to use
are the slow ones, which the authors evaluate: of trainings whose length is no multiple of k, the
last steps are not in them.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import Integer, fraction
from ..core.slots import weights


def slow_weights(p, s, inner):
    return s["slow"]


@wrapper(
    slots={"slow": weights},
    readout=slow_weights,
    moves=True,
    k=Integer(5, 1, 1000, log=True),
    alpha=fraction(0.5),
)
def lookahead(p, g, s, t, inner, k, alpha):
    fast = inner(p, g)
    # Products, not branches: t may be on another device.
    due = t % k == 0
    slow = (1 - due * alpha) * s["slow"] + due * alpha * fast
    return (1 - 1.0 * due) * fast + due * slow, {"slow": slow}
