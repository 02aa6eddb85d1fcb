"""The registry: every wrapper defined in a module of this package, and `partition`, by name."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module

from ..compose.partition import partition
from ..compose.wrapper import Wrapper
from ..core.rule import Rule

WRAPPERS: dict[str, Callable[..., Rule]] = {
    value.name: value
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__))
    for value in vars(import_module(f"{__name__}.{module}")).values()
    if isinstance(value, Wrapper)
} | {"partition": partition}

# The functions, not the modules of their names: `from hyperdescent.wrappers import clip_norm`.
globals().update(WRAPPERS)
