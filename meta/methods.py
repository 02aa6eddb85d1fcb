"""Every way to a hypergradient by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ..inner.rule import unknown
from .auto import Auto
from .bamm import BAMM
from .bda import BDA
from .estimate import Estimator
from .evolution import ES, PES
from .fixed_point import FixedPoint, OnePass
from .forward import Forward
from .forward_gradient import ForwardGradient
from .implicit import Implicit
from .linear import dense, neumann, normal_conjugate_gradient, nystrom
from .meha import MEHA
from .penalty import Penalty
from .population import Population
from .replay import Replay
from .sama import SAMA

METHODS: dict[str, Callable[[], Estimator]] = {
    "auto": Auto,
    "replay": Replay,
    "truncated": partial(Replay, window=10),
    "forward": Forward,
    "forward-gradient": ForwardGradient,
    "population": Population,
    "implicit": Implicit,
    "gauss-newton": partial(Implicit, curvature="gauss-newton"),
    "normal-equations": partial(Implicit, solve=normal_conjugate_gradient()),
    "neumann": partial(Implicit, solve=neumann()),
    "nystrom": partial(Implicit, solve=nystrom(), tolerance=math.inf),
    "dense": partial(Implicit, solve=dense()),
    "identity": partial(Implicit, solve=neumann(1.0, steps=0), tolerance=math.inf),
    "fixed-point": FixedPoint,
    "one-pass": OnePass,
    "sama": SAMA,
    "bda": BDA,
    "f2sa": Penalty,
    "v-pbgd": partial(Penalty, 0.1, growth=0.1, limit=10.0, warm_start=True),
    "bamm": BAMM,
    "meha": MEHA,
    "es": ES,
    "guided-es": partial(ES, guide=Replay(window=10)),
    "pes": PES,
    "es-single": partial(PES, kind="single"),
}


def find_method(name: str) -> Estimator:
    """An estimator by name; ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(unknown("there is no method", name, METHODS))
    return METHODS[name]()


__all__ = ["METHODS", "find_method"]
