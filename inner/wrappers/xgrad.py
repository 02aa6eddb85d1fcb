"""XGrad: gradients at the weights that the next steps are expected to reach. Guan et al. 2023,
arXiv:2305.18240.

p, where gradients are taken, is that prediction: the weights plus `steps` (the paper's s) times the
last step of the rule inside. The weights themselves are a slot, and those to use. The paper
predicts by a formula for each rule, from slots as the last step left them: lr * momentum buffer for
SGD, lr times the bias-corrected ratio of moments for Adam. Either is the last step itself as long
as lr stays the same; where it changes, this predicts by the lr of that step, the paper by the new
one. The paper leaves decoupled decay out of the prediction of AdamW, here it is in it. The authors'
code (guanleics/XGrad) predicts nothing for parameters whose grad is None, as zero_grad makes them.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import positive
from ..core.slots import weights


def stored(p, s, inner):
    return inner.readout(s["stored"])


@wrapper(slots={"stored": weights}, readout=stored, steps=positive(1.0, search=(0.1, 10.0)))
def xgrad(p, g, s, t, inner, steps):
    moved = inner(s["stored"], g)
    return moved + steps * (moved - s["stored"]), {"stored": moved}
