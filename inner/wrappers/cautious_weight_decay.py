"""Cautious weight decay: only where the update shrinks the weight too. Chen et al. 2025,
arXiv:2510.12402, Algorithm 1.

Decoupled: per unit of the learning rate of the rule inside (of 1, if it has none called lr). It
takes the place of that rule's own weight_decay. Weights whose update is 0 decay. smooth: sigmoid of
the step per unit of learning rate times the weight over temperature, in place of the mask.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import Choice, temperature, weight_decay
from ..numerics.elementwise import mask


@wrapper(
    moves=True,
    replaces=("weight_decay",),
    weight_decay=weight_decay(1e-2),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def cautious_weight_decay(p, g, s, t, inner, weight_decay, smooth, temperature):
    after = inner(p, g)
    against = mask(inner.direction(after - p) * p, smooth, temperature)
    return after - inner.rate(p) * weight_decay * (1 - against) * p, s
