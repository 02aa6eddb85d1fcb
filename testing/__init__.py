"""Contracts for everyone: what a rule, a wrapper, a problem, an estimator, an executor must hold.

    import hyperdescent as hd

    hd.testing.check_rule(my_rule)

Each `check_*` raises AssertionError, which names the thing, the property, what was found and what
to do; each is made of single checks, such as those of `rule_checks`, to be tests of their own.
Nothing here needs pytest.

May import: inner, meta, search, studies.
"""

from .contracts import Check, run_checks
from .estimators import check_estimator, estimator_checks
from .executors import check_executor, executor_checks
from .problems import check_problem, problem_checks
from .rules import check_rule, rule_checks
from .wrappers import check_wrapper, wrapper_checks

__all__ = [
    "Check",
    "check_estimator",
    "check_executor",
    "check_problem",
    "check_rule",
    "check_wrapper",
    "estimator_checks",
    "executor_checks",
    "problem_checks",
    "rule_checks",
    "run_checks",
    "wrapper_checks",
]
