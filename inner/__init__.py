"""Update rules as pure functions, differentiable in every hyperparameter, and their torch form.

May import: nothing.

Importing it fills the registry.
"""

from . import rules, wrappers

__all__ = ["rules", "wrappers"]
