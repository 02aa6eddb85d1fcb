"""Weight decay around any rule. Loshchilov & Hutter 2019, arXiv:1711.05101, name the two kinds."""

from ..compose.wrapper import wrapper
from ..core.hyper import weight_decay


@wrapper(moves=True, replaces=("weight_decay",), weight_decay=weight_decay(1e-2))
def decoupled_weight_decay(p, g, s, t, inner, weight_decay):
    """Weights shrunk beside the step. Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

    Per unit of the learning rate of the rule inside (of 1, if it has none called lr), as in
    torch.optim.AdamW: around adam it is that. It takes the place of that rule's own weight_decay.
    """
    return inner(p, g) - inner.rate(p) * weight_decay * p, s


@wrapper(replaces=("weight_decay",), weight_decay=weight_decay(1e-4))
def coupled_weight_decay(p, g, s, t, inner, weight_decay):
    """The gradient of weight_decay / 2 times the squared norm of weights added to that of the loss
    (L2 regularization). Hanson & Pratt 1988, proceedings.neurips.cc/paper/1988/hash/
    1c9ac0159c94d8d0cbedc973445af2da-Abstract.html.

    As weight_decay in torch.optim.Adam. It takes the place of that of the rule inside.
    """
    return inner(p, g + weight_decay * p), s
