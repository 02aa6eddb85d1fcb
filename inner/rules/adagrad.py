"""Adagrad. Duchi, Hazan & Singer 2011, jmlr.org/papers/v12/duchi11a, diagonal form.

The decay of the learning rate and the start of the sum are those of torch.optim.Adagrad.
"""

from ..core.hyper import learning_rate, positive, weight_decay
from ..core.rule import rule
from ..core.slots import filled_with
from ..numerics.elementwise import root


@rule(
    "Adagrad",
    slots={"sum": filled_with("initial_accumulator_value")},
    lr=learning_rate(1e-2, search=(1e-4, 10.0)),
    lr_decay=positive(0.0, search=(1e-6, 1.0), start=1e-4),
    weight_decay=weight_decay(0.0),
    initial_accumulator_value=positive(0.0, search=(1e-8, 1.0), start=1e-4),
    eps=positive(1e-10, search=(1e-12, 1e-2)),
)
def adagrad(p, g, s, t, lr, lr_decay, weight_decay, initial_accumulator_value, eps):
    g = g + weight_decay * p
    total = s["sum"] + g * g
    return p - lr / (1 + (t - 1) * lr_decay) * g / (root(total) + eps), {"sum": total}
