"""Cautious AdamW: only where the first moment agrees with the gradient. Liang et al. 2024,
arXiv:2411.16085.

As the newest code of the authors (kyleliang919/C-Optim, c_adamw.py), where sources differ: what is
left of a tensor's step is scaled by 1 / max(share of agreeing elements, 0.001), where the paper has
numel / (their number + 1), which halves the steps of a tensor of one element; eps is 1e-6 and added
to the root of the biased second moment; there is no weight decay by default. The mask is of m * g:
decay, which is decoupled, passes by it; the mask of the wrapper `cautious` is of all that the rule
inside does. Slopes are those between jumps: where a small change of any hyper turns an element of
the mask over, the path jumps, which no slope shows.

smooth puts sigmoid(m * g / temperature) in place of the mask.
"""

from ..core.hyper import Choice, decay, learning_rate, positive, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import mask, root
from .adam import moments


@rule(
    "CAdamW",
    over="tensor",
    slots={"m": zeros, "v": zeros},
    lr=learning_rate(1e-3),
    beta1=decay(0.9),
    beta2=decay(0.999),
    eps=positive(1e-6, search=(1e-12, 1e-2)),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def cadamw(p, g, s, t, lr, beta1, beta2, eps, weight_decay, smooth, temperature):
    m, v = moments(g, s, beta1, beta2)
    agrees = mask(m * g, smooth, temperature)
    kept = m * agrees / agrees.mean().clamp(min=1e-3)
    step = root(1 - beta2**t) / (1 - beta1**t) * kept / (root(v) + eps)
    return (1 - lr * weight_decay) * p - lr * step, {"m": m, "v": v}
