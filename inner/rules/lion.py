"""Lion and its cautious form: steps of one size in every element, and the sign of an average."""

from ..core.hyper import Choice, decay, learning_rate, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import mask, sign

_ROUGH = "it enters only through a sign"


def lion_signs(g, m, beta1, beta2, smooth, temperature):
    """Lion's direction and its next average: the gradient counts for more in the first."""
    c = beta1 * m + (1 - beta1) * g
    return sign(c, smooth, temperature), beta2 * m + (1 - beta2) * g


@rule(
    "Lion",
    slots={"m": zeros},
    lr=learning_rate(1e-4, search=(1e-6, 0.1)),
    beta1=decay(0.9, rough=_ROUGH),
    beta2=decay(0.99, rough=_ROUGH),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def lion(p, g, s, t, lr, beta1, beta2, weight_decay, smooth, temperature):
    """Lion: the sign of an average of gradients. Chen et al. 2023, arXiv:2302.06675.

    As the authors' code (google/automl, lion): decoupled decay, and no bias correction, which a
    sign would not notice. smooth puts tanh(c / temperature) in place of the sign.
    """
    u, m = lion_signs(g, s["m"], beta1, beta2, smooth, temperature)
    return (1 - lr * weight_decay) * p - lr * u, {"m": m}


@rule(
    "CLion",
    over="tensor",
    slots={"m": zeros},
    lr=learning_rate(1e-4, search=(1e-6, 0.1)),
    beta1=decay(0.95, rough=_ROUGH),
    beta2=decay(0.98, rough=_ROUGH),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def clion(p, g, s, t, lr, beta1, beta2, weight_decay, smooth, temperature):
    """Cautious Lion: only where its sign agrees with the gradient's. Liang et al. 2024,
    arXiv:2411.16085.

    As the authors' code (kyleliang919/C-Optim, c_lion.py): what is left of a tensor's step is
    scaled by numel / (number of agreeing elements + 1), which their newer C-AdamW has replaced;
    betas begin at (0.95, 0.98), not at Lion's (0.9, 0.99). A tensor of one element is moved by half
    of lr at most. smooth puts tanh(c / temperature) in place of the sign, and a sigmoid of the same
    width in place of the mask: both are of gradients.
    """
    u, m = lion_signs(g, s["m"], beta1, beta2, smooth, temperature)
    agrees = mask(u * g, smooth, temperature)
    u = u * agrees * (u.numel() / (agrees.sum() + 1))
    return (1 - lr * weight_decay) * p - lr * u, {"m": m}
