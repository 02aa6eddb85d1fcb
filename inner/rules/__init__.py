"""Every rule of the catalogue, one file each or one per family; what they define is registered.

May import: core, numerics, registry, compose.
"""

import pkgutil
from importlib import import_module

from ..core.rule import Rule
from ..registry import RULES

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    _found = vars(import_module(f"{__name__}.{_module}")).values()
    RULES |= {value.name: value for value in _found if isinstance(value, Rule)}
