"""Search without gradients: the Searcher protocol and Optuna behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..meta.problems.seeding import fold_in
from ..meta.training.outcome import Outcome
from .optuna_journal import open_journal
from .optuna_space import distributions, parameters, suggest
from .space import Point, Space

if TYPE_CHECKING:
    from optuna import Study, Trial


class Searcher(Protocol):
    """Proposes points and learns from what became of them."""

    def ask(self) -> Point: ...

    def tell(self, value: float | Outcome) -> None:
        """What became of the point asked for last: its loss, or why it has none."""
        ...


class OptunaSearcher:
    """Optuna's TPE in a Space (Bergstra et al. 2011; Watanabe 2023, arXiv:2304.11127).

    The first point asked for is start. known: (point, loss) pairs evaluated elsewhere, from which
    it learns before its first proposal. journal: a file that keeps every trial, so that another
    searcher on it goes on where this one stopped.
    """

    def __init__(
        self,
        space: Space,
        start: Point,
        *,
        seed: int,
        known: list[tuple[Point, float]] | None = None,
        journal: Path | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._study: Study = optuna.create_study(
            study_name="search",
            storage=open_journal(journal) if journal else None,
            load_if_exists=True,
        )
        self._trial: Trial | None = None
        before = len(self._study.get_trials(deepcopy=False))
        # A sampler resumed with its first seed would repeat the draws of its first session.
        self._study.sampler = optuna.samplers.TPESampler(seed=fold_in(seed, before) % 2**32)
        if before:
            self._ask_again()
            return
        ranges = distributions(space)
        for point, loss in known or []:
            numbers = parameters(space, point)
            self._study.add_trial(
                optuna.create_trial(
                    params=numbers,
                    distributions={key: ranges[key] for key in numbers},
                    value=loss,
                )
            )
        self._study.enqueue_trial(parameters(space, start))

    def _ask_again(self) -> None:
        """Put what an earlier session asked for but never told first in line."""
        from optuna.trial import TrialState

        # As the sole writer, nobody else is running them.
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    def ask(self) -> Point:
        self._trial = self._study.ask()
        return suggest(self._space, self._trial)

    def tell(self, value: float | Outcome) -> None:
        from optuna.trial import TrialState

        if self._trial is None:
            raise RuntimeError("tell() answers an ask(); call ask() first")
        if isinstance(value, Outcome) or not math.isfinite(value):
            # TPE ranks a pruned trial below every finished one and learns from it; FAIL it ignores.
            self._study.tell(self._trial, state=TrialState.PRUNED)
        else:
            self._study.tell(self._trial, value)
        self._trial = None
