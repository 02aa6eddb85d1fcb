"""Every way to a hypergradient: its class, with options, and its name, for `method=`."""

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
from .implicit.hypergradient_descent import HypergradientDescent
from .implicit.implicit import Implicit, Unconverged
from .implicit.linear_solvers import dense, neumann, normal_conjugate_gradient, nystrom
from .reverse.replay import Replay
from .sampling.control_variate import Guess
from .sampling.evolution_strategies import ES, PES
from .sampling.forward_gradient import ForwardGradient
from .sampling.population import Population
from .training.estimate import Estimate, Estimator, Note

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


def find_estimator(method: str | Estimator) -> Estimator:
    """The estimator of this name, or the one given.

    Args:
        method: one of METHODS, or an Estimator.

    Raises:
        ValueError, TypeError: if it is neither.
    """
    if isinstance(method, Estimator):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"method={method!r} is neither the name of a method nor an estimator; make it a class "
            "derived from hyperdescent.estimators.Estimator, whose __call__ it is"
        )
    if method not in METHODS:
        raise ValueError(unknown("there is no method", method, METHODS))
    return METHODS[method]()


__all__ = [
    "BAMM",
    "BDA",
    "ES",
    "MEHA",
    "METHODS",
    "PES",
    "SAMA",
    "Auto",
    "Estimate",
    "Estimator",
    "FixedPoint",
    "Forward",
    "ForwardGradient",
    "Guess",
    "HypergradientDescent",
    "Implicit",
    "Note",
    "OnePass",
    "Penalty",
    "Population",
    "Replay",
    "Unconverged",
    "find_estimator",
]
