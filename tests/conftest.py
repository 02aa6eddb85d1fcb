"""One thread: on models this small a second one only waits, on a busy machine for minutes.

And no compiling unasked, which would hang on what this machine has compiled before; tests of what
is compiled say compile=True.
"""

import gc
import os

import pytest
import torch

torch.set_num_threads(1)
os.environ["TORCH_COMPILE_DISABLE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def prices_of_their_own(tmp_path_factory):
    """What compiling takes here is no guide for whoever uses this machine, nor the other way."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


def pytest_collection_finish(session):
    """What is loaded by now stays; to look through it takes half a second each time."""
    gc.collect()
    gc.freeze()
