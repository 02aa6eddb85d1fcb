"""Cautious updates: only where they agree with the gradient. Liang et al. 2024, arXiv:2411.16085.

What is left of a tensor's step is scaled by 1 / max(share of agreeing elements, 0.001), as in the
authors' later code (kyleliang919/C-Optim, c_adamw.py). The paper has numel / (their number + 1),
nearly the same for many elements, but it halves every step of a tensor of one.

All that the rule inside does is masked, its decay of weights too, which the paper leaves:
decoupled_weight_decay(cautious(adam)) is its C-AdamW. smooth: sigmoid of the step per unit of
learning rate times the gradient over temperature, in place of the mask.
"""

from ..compose.wrapper import wrapper
from ..core.hyper import Choice, temperature
from ..numerics.elementwise import mask


@wrapper(over="tensor", moves=True, smooth=Choice(False, (False, True)), temperature=temperature())
def cautious(p, g, s, t, inner, smooth, temperature):
    step = p - inner(p, g)
    agrees = mask(inner.direction(step) * g, smooth, temperature)
    return p - step * agrees / agrees.mean().clamp(min=1e-3), s
