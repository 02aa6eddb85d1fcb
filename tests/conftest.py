"""One thread: on models this small a second one only waits, on a busy machine for minutes.

And no compiling unasked, which would hang on what this machine has compiled before; tests of what
is compiled say compile=True.
"""

import gc
import os

import torch

torch.set_num_threads(1)
os.environ["TORCH_COMPILE_DISABLE"] = "1"


def pytest_collection_finish(session):
    """What is loaded by now stays; to look through it takes half a second each time."""
    gc.collect()
    gc.freeze()
