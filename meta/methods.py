"""Every way to a hypergradient by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ..inner.core.messages import unknown
from .auto import Auto
from .bilevel.bamm import BAMM
from .bilevel.bda import BDA
from .bilevel.meha import MEHA
from .bilevel.penalty import Penalty
from .bilevel.sama import SAMA
from .forward.forward import Forward
from .implicit.fixed_point import FixedPoint, OnePass
from .implicit.implicit import Implicit
from .implicit.linear_solvers import dense, neumann, normal_conjugate_gradient, nystrom
from .reverse.replay import Replay
from .sampling.evolution_strategies import ES, PES
from .sampling.forward_gradient import ForwardGradient
from .sampling.population import Population
from .training.estimate import Estimator

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
