"""Numbers and matrices, for rules: functions of tensors, differentiable, without state.

May import: nothing.
"""

from .counter_rng import normal, uniform
from .elementwise import at_least_float32, mask, root, sign
from .matrix_roots import newton_inverse_root
from .newton_schulz import polar

__all__ = [
    "at_least_float32",
    "mask",
    "newton_inverse_root",
    "normal",
    "polar",
    "root",
    "sign",
    "uniform",
]
