"""Data that no package brings along, found through an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

DATA = "HYPERDESCENT_DATA"


def find_file(name: str, what: str) -> Path:
    """The file called name in the folder that HYPERDESCENT_DATA names.

    what: it is and where it is from, for the FileNotFoundError that is raised if it is not there.
    """
    folder = os.environ.get(DATA)
    file = Path(folder or "", name)
    if not folder or not file.is_file():
        where = f"the folder {folder} has none" if folder else f"{DATA} is not set"
        raise FileNotFoundError(
            f"{name} is needed and {where}: put {what} into a folder under that name, and set "
            f"{DATA} to the folder"
        )
    return file


__all__ = ["DATA", "find_file"]
