"""Steps of one size in every element, in the direction of a sign."""

from ..core.hyper import Choice, decay, learning_rate, temperature, weight_decay
from ..core.rule import rule
from ..core.slots import zeros
from ..numerics.elementwise import sign


@rule(
    "SignSGD",
    lr=learning_rate(1e-3, search=(1e-6, 1.0)),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def signsgd(p, g, s, t, lr, weight_decay, smooth, temperature):
    """signSGD: the sign of the gradient. Bernstein et al. 2018, arXiv:1802.04434, Algorithm 1.

    Steepest descent in the maximum norm, without state. Weight decay is decoupled; smooth puts
    tanh(g / temperature) in place of the sign.
    """
    return (1 - lr * weight_decay) * p - lr * sign(g, smooth, temperature), s


@rule(
    "Signum",
    slots={"momentum_buffer": zeros},
    lr=learning_rate(1e-3, search=(1e-6, 1.0)),
    momentum=decay(0.9, rough="it enters only through a sign"),
    weight_decay=weight_decay(0.0),
    smooth=Choice(False, (False, True)),
    temperature=temperature(),
)
def signum(p, g, s, t, lr, momentum, weight_decay, smooth, temperature):
    """Signum: signSGD with momentum. Bernstein et al. 2018, arXiv:1802.04434, Algorithm 2.

    The buffer is an average of gradients, without bias correction: a sign has no size. Without
    momentum it is signSGD. Weight decay is decoupled; smooth puts tanh(m / temperature) in place of
    the sign.
    """
    m = momentum * s["momentum_buffer"] + (1 - momentum) * g
    u = sign(m, smooth, temperature)
    return (1 - lr * weight_decay) * p - lr * u, {"momentum_buffer": m}
