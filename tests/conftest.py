"""One thread: on models this small a second one only waits, on a busy machine for minutes.

And no compiling unasked, which would hang on what this machine has compiled before; tests of what
is compiled say compile=True.
"""

import gc
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from spanning import SPANNING

from hyperdescent.inner.core.rule import Rule
from hyperdescent.inner.registry import RULES

torch.set_num_threads(1)
os.environ["TORCH_COMPILE_DISABLE"] = "1"
# What inductor keeps on disk for other instructions of this processor does not compile.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = Path(tempfile.gettempdir(), f"torchinductor-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


@pytest.fixture(autouse=True, scope="session")
def prices_of_their_own(tmp_path_factory):
    """What compiling takes here is no guide for whoever uses this machine, nor the other way."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


def pytest_addoption(parser):
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run what is asserted of every rule on all of them, not on those of spanning.py "
        "alone, and all cases of what is sampled",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "sampled(count): of a test whose cases take long, so many are run without --thorough",
    )


def pytest_collection_modifyitems(config, items):
    """Of a test that is run on many registered rules, keep those that span the others; of one that
    is sampled, so many cases.
    """
    if config.getoption("--thorough"):
        return
    rules = defaultdict(set)
    for item in items:
        if name := _rule_of(item):
            rules[item.function].add(name)
    many = {function for function, names in rules.items() if len(names) > 2 * len(SPANNING)}
    left_out = [
        item
        for item in items
        if item.function in many and (_rule_of(item) or SPANNING[0]) not in SPANNING
    ]
    sampled = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            sampled[item.function].append(item)
    for cases in sampled.values():
        (count,) = cases[0].get_closest_marker("sampled").args
        kept = {len(cases) * k // count for k in range(count)} if count else set()
        left_out += [case for k, case in enumerate(cases) if k not in kept]
    config.hook.pytest_deselected(items=left_out)
    gone = set(left_out)
    items[:] = [item for item in items if item not in gone]


def _rule_of(item):
    """The name of the registered rule that an item is about, if it is about one."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, Rule) and value.name in RULES:
            return value.name
        if isinstance(value, str) and value in RULES:
            return value
    return None


def pytest_collection_finish(session):
    """What is loaded by now stays; to look through it takes half a second each time."""
    gc.collect()
    gc.freeze()
