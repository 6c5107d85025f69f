"""Names that people get wrong: what there is instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")


def known(name: object, names: Collection[str]) -> str:
    """Return the hint for a name that is none of these."""
    there = f"there are {', '.join(map(repr, names))}" if names else "there are none"
    # Of two letters one may be wrong.
    near = difflib.get_close_matches(str(name), names, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}? ({there})" if near else there


class Named(Mapping[str, V], Generic[V]):
    """What is known by name; another name is a KeyError that says what names there are.

    :param problem: tells of a name what is wrong with it.
    """

    def __init__(self, items: Mapping[str, V], problem: Callable[[object], str]) -> None:
        self._items = dict(items)
        self._problem = problem

    def __getitem__(self, name: str) -> V:
        try:
            return self._items[name]
        except KeyError:
            raise KeyError(f"{self._problem(name)}; {known(name, self._items)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)
