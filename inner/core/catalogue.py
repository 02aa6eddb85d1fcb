"""Things by name, as attributes too: `rules["adamw"]` is `rules.adamw`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from .messages import unknown

T = TypeVar("T")


class Catalogue(dict[str, T]):
    """A dict whose keys can be read as attributes. what: is in it, for errors, such as "rule"."""

    def __init__(self, what: str, doc: str) -> None:
        super().__init__()
        self._what = what
        self.__doc__ = doc

    def __getattr__(self, name: str) -> T:
        if name.startswith("_") or name not in self:
            raise AttributeError(unknown(f"there is no {self._what}", name, self))
        return self[name]

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        yield from self
