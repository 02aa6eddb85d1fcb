"""Every step of the whole model times a random number of mean 1, drawn from Exp(1).
Zhang & Cutkosky 2024, arXiv:2405.09742.

Then the expected gradient at the new weights, along the step, is what the loss changed by, which
makes an online learner a method for losses that are neither smooth nor convex. The number has
variance 1: use averaged weights, ema(random_scaling(sgd)), as the theory does.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import Integer
from ..numerics.counter_rng import uniform

# A stream of its own, apart from a rule's that draws with the same seed.
_STREAM = 0x5CA1E


@wrapper(moves=True, seed=Integer(0, 0, 2**31 - 1))
def random_scaling(p, g, s, t, inner, seed):
    scale = -uniform(t, (), seed=seed, stream=_STREAM).log()
    return p + scale * (inner(p, g) - p), s
