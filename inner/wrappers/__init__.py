"""Every wrapper, a rule around a rule, one file each; what they define is registered.

May import: core, numerics, registry, compose.
"""

import pkgutil
from importlib import import_module

from ..compose.partition import partition
from ..compose.wrapper import Wrapper
from ..registry import WRAPPERS

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    _found = vars(import_module(f"{__name__}.{_module}")).values()
    WRAPPERS |= {value.name: value for value in _found if isinstance(value, Wrapper)}
WRAPPERS["partition"] = partition

# The functions, not the modules of their names: `from hyperdescent.wrappers import clip_norm`.
globals().update(WRAPPERS)
