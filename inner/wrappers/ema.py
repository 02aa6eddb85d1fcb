"""The weights to use are an exponential average of those trained. Polyak & Juditsky 1992,
doi:10.1137/0330046, who average evenly; exponentially as in Adam, arXiv:1412.6980, section 7.2.

Free of bias, as there: the first weights in it are those after the first step, with no more than
their share. torch.optim.swa_utils.AveragedModel with get_ema_avg_fn gives them all that is missing
to 1: after t steps it holds (1 - decay**t) times this average and decay**t times them. In at least
float32: bfloat16 would round the last percent of an average's movement away.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import decay
from ..core.slots import Slot
from ..numerics.elementwise import at_least_float32


def long_weights(p, values, layout):
    return p.to(at_least_float32(p.dtype), copy=True)


def average(p, s, inner):
    return s["average"].to(p.dtype)


@wrapper(
    slots={"average": Slot(long_weights)},
    readout=average,
    decay=decay(0.999, search=(0.5, 0.99999)),
)
def ema(p, g, s, t, inner, decay):
    p = inner(p, g)
    new = (1 - decay) / (1 - decay**t)
    return p, {"average": (1 - new) * s["average"] + new * inner.readout(p)}
