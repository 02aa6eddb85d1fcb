"""Implicit differentiation: the hypergradient at an optimum of the training loss.

With f the training loss, F the held-out loss and grad f(w, hypers) = 0,
d F / d hypers = dF/dhypers - d<df/dw, q>/dhypers, where q solves H q = dF/dw and H is the Hessian
of f. Larsen et al. 1996; Bengio 2000, doi:10.1162/089976600300015187; Lorraine, Vicol & Duvenaud
2020, arXiv:1911.02590.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from typing import Literal

from ...inner.core.hyper import Tensors
from ...inner.core.messages import unknown
from ..tracing.cost_model import spend_on_products, worth_tracing_products
from ..tracing.verify import with_autograd_fallback
from ..training.estimate import Estimate, GoingOn, Note, finished
from ..training.outcome import Outcome
from ..training.state import Resolved
from ..training.training import Training
from .curvature import Curvature, SplitLoss
from .hessian_products import (
    ProductMachine,
    autograd_products,
    product_machine_of,
    traced_products,
)
from .inner_solution import (
    InnerSolution,
    check_moves_optimum,
    continue_training,
    held_out,
    no_graph,
    no_second_derivative,
    total,
)
from .linear_solvers import Solve, conjugate_gradient


class Unconverged(UserWarning):
    """The inner training has not come to where an implicit method takes it to be."""


# The share of the held-out loss that going on to the optimum may change before a warning says so.
_FAR = 0.1


@dataclass(frozen=True)
class Implicit(GoingOn):
    """The gradient of the held-out loss at the optimum that training leads to.

    Only hypers of the training loss move that optimum; others in the point raise ValueError. The
    answer is that of the optimum and not of `training.steps` steps: its error is of the order of
    note.inner_gradient, the gradient's norm where 0 is assumed; note.gap is what reaching the
    optimum would change in the held-out loss, to first order, and a warning says so where that is
    much. Memory does not grow with steps. Buffers are constants here: the path through batch norm's
    running statistics is left out. So is a weight decay of the rule, which is not in the training
    loss: FixedPoint goes through it.

    Args:
        solve: the linear solver, one of `hyperdescent.solvers`.
        batches: the curvature is that of the mean loss over so many batches, those that training
            would draw next.
        warm_start: go on from where the last call ended, its optimizer state included, so that few
            steps follow small moves.
        tolerance: a larger residual of the solve is NOISY, not used; inf takes any.
        curvature: "hessian", or "gauss-newton" for the Hessian without the model's own curvature,
            which is positive where the Hessian may not be; the limit of training has the Hessian's.
        compile: True runs products with the Hessian as generated code and "trace" as traced
            operations, both with what all products share computed once; "auto" traces once
            autograd's products on this problem have taken as long as that takes to pay. What cannot
            be traced, or first disagrees with autograd, is done by autograd, and note.how says so.
    """

    solve: Solve = field(default_factory=conjugate_gradient)
    batches: int = 1
    warm_start: bool = False
    tolerance: float = 0.1
    curvature: Curvature = "hessian"
    compile: bool | Literal["auto", "trace"] = "auto"

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"batches={self.batches} leaves no loss to differentiate; give >= 1")
        if self.curvature not in ("hessian", "gauss-newton"):
            known = ["hessian", "gauss-newton"]
            raise ValueError(unknown("there is no curvature", self.curvature, known))
        if self.compile not in (True, False, "auto", "trace"):
            raise ValueError(f"compile={self.compile!r} is none of True, False, 'auto', 'trace'")
        if self.compile in (True, "trace") and self.curvature != "hessian":
            raise ValueError(
                f"compile={self.compile!r} is of products with the Hessian; those with "
                f"curvature={self.curvature!r} are done by autograd: give compile='auto'"
            )

    def __call__(
        self, training: Training, point: Tensors, carry: InnerSolution | None = None, *, seed: int
    ) -> tuple[Estimate, InnerSolution | None]:
        self._check(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        reached = continue_training(training, resolved, carry, seed)
        if isinstance(reached, Estimate):
            return reached, None
        estimate = self._at(training, resolved, reached, list(point), seed)
        if not self.warm_start:
            warn_if_far(training, estimate)
        if not self.warm_start or estimate.note.outcome is Outcome.NOT_DIFFERENTIABLE:
            return estimate, None
        return estimate, reached

    def at(
        self, training: Training, point: Tensors, reached: InnerSolution, *, seed: int
    ) -> Estimate:
        """The same where a training by whatever means has ended; nothing is trained."""
        self._check(training, point)
        resolved = training.resolve({name: value.detach() for name, value in point.items()})
        return self._at(training, resolved, reached, list(point), seed)

    def _check(self, training: Training, point: Tensors) -> None:
        """Raise ValueError or TypeError for what has no implicit hypergradient."""
        check_moves_optimum(training, point)
        if self.curvature == "gauss-newton" and not isinstance(training.problem, SplitLoss):
            raise TypeError(
                f"curvature='gauss-newton' has to see the output of the model, and "
                f"{training.problem.name} has no output() and loss_of(); give curvature='hessian'"
            )
        parts = training.problem.accumulate
        if self.curvature == "gauss-newton" and parts > 1:
            raise ValueError(
                f"curvature='gauss-newton' is of whole batches, and {training.problem.name} has "
                f"accumulate={parts}; give curvature='hessian', or a problem without accumulate"
            )

    def _at(
        self,
        training: Training,
        resolved: Resolved,
        reached: InnerSolution,
        names: list[str],
        seed: int,
    ) -> Estimate:
        values = resolved.at(training.steps - 1)
        loss, slope, direct = held_out(training, reached.state, values, names)
        if slope is None:
            return no_graph(training, loss)
        b = slope
        ahead = range(reached.steps, reached.steps + self.batches)

        def attempt(refused: str) -> Estimate:
            began = time.monotonic()
            machine = None if refused else self._machine(training, values, names, seed)
            at = training, reached.state, values
            if machine:
                product, gradient, mixed = traced_products(machine, *at, ahead, seed)
                how = machine.how
            else:
                product, gradient, mixed = autograd_products(
                    *at, names, ahead, seed, self.curvature
                )
                how = f"by autograd{f': {refused}' if refused else ''}"
            solved = self.solve(product, b)
            how += machine.remark if machine else ""
            del product  # Before the gradient's graph is made, if it was not part of that.
            g = gradient()
            gap = -float(g @ solved.x)
            note = Note(
                steps=training.steps,
                residual=solved.residual,
                inner_gradient=float(g.norm()),
                gap=gap,
                how=f"{solved.steps} products {how}, residual {solved.residual:.1e}, gap {gap:.1g}",
            )
            # An infinite one says that x means nothing, whatever is tolerated.
            if not solved.residual <= self.tolerance or solved.residual == float("inf"):
                return Estimate(float(loss), {}, unsolved(note, self.tolerance))
            shares = {n: m.neg_() for n, m in zip(names, mixed(solved.x), strict=True)}
            if not machine and self.curvature == "hessian":
                spend_on_products(training.problem, time.monotonic() - began)
            return finished(loss, total(direct, shares), note)

        try:
            return with_autograd_fallback(training.problem, self.compile, attempt)
        except RuntimeError as error:
            return no_second_derivative(training, error)

    def _machine(
        self, training: Training, values: Tensors, names: list[str], seed: int
    ) -> ProductMachine | None:
        """What does the products, if not autograd."""
        want = self.compile
        if want == "auto":
            # One graph would be of all parts of a batch at a time.
            whole = training.problem.accumulate == 1
            want = "trace" if whole and worth_tracing_products(training.problem) else False
        if not want or self.curvature != "hessian":
            return None
        return product_machine_of(training, values, names, seed, interpreted=want == "trace")


def warn_if_far(training: Training, estimate: Estimate) -> None:
    """Warn where training has not come near what an implicit method takes it for."""
    gap, loss = estimate.note.gap, estimate.loss
    if gap is not None and estimate.ok and abs(gap) > _FAR * abs(loss):
        warnings.warn(
            f"{training.label} has not converged after {training.steps} steps: going on would "
            f"change the held-out loss of {loss:.3g} by about {gap:.2g}, so that its implicit "
            "gradient is not that of this training; give more steps, or use method='replay'",
            Unconverged,
            stacklevel=4,
        )


def unsolved(note: Note, tolerance: float) -> Note:
    """A note made NOISY because of its residual."""
    reason = (
        f"the linear solve ended at residual {note.residual:.3g}, above {tolerance:g}; give it "
        "more steps or terms, or a larger tolerance"
        if note.residual != float("inf")
        else "the linear solve failed (residual inf): the Hessian of the training loss is not "
        "positive definite there, or the solver's step size is too large"
    )
    return replace(note, outcome=Outcome.NOISY, reason=reason)


__all__ = ["Implicit", "Unconverged"]
