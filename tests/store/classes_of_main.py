"""A script that puts structures of its own classes into another process's store, and reads them here and in a third."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from store_harness import peers, run


class Color(enum.Enum):
    RED = 1


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: Any
    y: Any


class Near(Point):
    @property
    def total(self) -> float:
        return float(self.x.sum())


@dataclass(frozen=True)
class Name:
    first: str


def local() -> Any:
    class Local(NamedTuple):
        x: Any

    return Local


def total_of(tree: Any) -> float:
    """Return the sum of all elements, by what only its own class knows."""
    return sum(each.total for each in tree[Color.RED])


async def main(a: Any, b: Any, c: Any) -> None:
    own, array = local(), np.arange(4.0)
    key = lambda: 0  # noqa: E731
    tree = {
        Color.RED: [Near(array, array), Near(array + 1, array)],
        Flag.A | Flag.B: Point(array, [array]),
        Name("a"): own(array),
        ("t", Color.RED): (array,),
        key: {"plain": array},
    }
    ref = await a.put(tree)
    await b.keep(ref)
    await b.pass_on(c)
    passed = await c.give()
    for found in (await ref, await passed):
        (red, flag, name, both, function) = found
        assert red is Color.RED
        assert type(flag) is Flag
        assert (flag, name, both) == (Flag.A | Flag.B, Name("a"), ("t", Color.RED))
        assert function() == 0
        assert [type(each) for each in found[red]] == [Near, Near]
        assert type(found[flag]) is Point
        assert type(found[name]) is own
        np.testing.assert_array_equal(found[flag].x, array)
    assert await c.apply(total_of) == 16
    out = {Color.RED: [Point(np.zeros(4), np.zeros(4))]}
    await (await a.put({Color.RED: [Point(array, array)]})).into(out)
    np.testing.assert_array_equal(out[Color.RED][0].x, array)


if __name__ == "__main__":
    with peers("a", "b", "c", hosts=tuple(sys.argv[1:])) as three:
        run(main(*(peer.handle for peer in three)))
