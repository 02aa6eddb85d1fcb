"""Cautious updates: only where they agree with the gradient. Liang et al. 2024, arXiv:2411.16085.

What is left is scaled up by numel / (number of agreeing entries + 1), the paper's scale.
"""

from ..hyper import Choice, temperature
from ..rule import mask
from ..wrap import wrapper


@wrapper(over="tensor", smooth=Choice(False, (False, True)), temperature=temperature())
def cautious(p, g, s, t, inner, smooth, temperature):
    u = p - inner(p, g)
    agrees = mask(u * g, smooth, temperature)
    return p - u * agrees * (u.numel() / (agrees.sum() + 1)), s
