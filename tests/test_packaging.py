"""What is on disk is what a stranger installs."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("inner", "meta", "search", "studies", "testing", "scripts")


def sources():
    """Every module of the package, as the wheel should hold it."""
    rooms = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    paths = [ROOT / "__init__.py", ROOT / "py.typed", *rooms]
    return {f"hyperdescent/{path.relative_to(ROOT).as_posix()}" for path in paths}


def test_the_wheel_holds_what_is_on_disk(tmp_path):
    copy = tmp_path / "source"
    # A copy, so that nothing a build left behind comes in.
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE", *sources()]:
        path = Path(name.removeprefix("hyperdescent/"))
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if ".dist-info/" not in name} == sources()
    assert any(name.endswith("licenses/LICENSE") for name in held)
