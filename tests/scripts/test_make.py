"""The Makefile, by what it would run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize(
    ("given", "torch"),
    [([], " torch"), (["TORCH_INDEX=here"], " --index-url here torch")],
)
def test_torch_comes_from_the_index_that_is_given(tmp_path, given, torch):
    told = subprocess.run(
        ["make", "--dry-run", "demo", f"VENV={tmp_path}/new", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = " ".join(told.stdout.replace("\\\n", " ").split())
    assert f"--constraint constraints.txt{torch}" in lines
    assert lines.count("--index-url") == len(given)
