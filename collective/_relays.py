"""How the ranks of one host that lack the same elements pass them on to each other, each as much as any other.

A *course* is for elements that the same ranks lack. It is cut into equal ranges. In each, one rank is the last and
passes nothing on, and every other passes on as much as the range has: so ranks differ by the ranges in which they are
last. Those ranks are chosen over all courses of a cell together, always such that were last in the fewest elements.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from collective._rings import CHAIN, CHAINED, LEFT, RIGHT, Ring
from collective._tallies import Division

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

GRAIN = 32 << 10
"""Bytes below which a block is not cut for the sake of even shares."""
_SPREAD = 8
"""Into how many ranges a large block is cut for them at most."""


class Step(NamedTuple):
    """Elements from `start` to `stop` of a block, and the way that they take through a ring."""

    start: int
    stop: int
    last: int
    way: int


class Course:
    """The elements that the ranks of a ring lack, and which of those is last in which range of them."""

    __slots__ = ("_division", "_lasts", "ring")

    def __init__(self, ring: Ring, division: Division, lasts: Sequence[int]) -> None:
        self.ring = ring
        self._division = division
        self._lasts = lasts

    def cut(self, position: int, start: int, stop: int) -> Iterator[Step]:
        """Yield the steps of elements from start to stop of a block that begins at a position of the course."""
        if self.ring.size == 1:
            yield Step(start, stop, 0, CHAIN)
            return
        for low, high, part in self._division.cut(position + start, position + stop):
            last = self._lasts[part]
            if self.ring.size <= CHAINED:
                yield Step(start + low, start + high, last, CHAIN)
                continue
            middle = self._division.start(part) + self._division.length(part) // 2 - position - start
            if low < middle:
                yield Step(start + low, start + min(high, middle), last, LEFT)
            if high > middle:
                yield Step(start + max(low, middle), start + high, last, RIGHT)


def courses(
    mates: Sequence[int], lacked: Sequence[tuple[Collection[int], int]], blocks: int, volume: int
) -> list[Course | None]:
    """Return the courses of a cell on one host, None where there is nothing or nobody lacks it.

    :param lacked: for each course, the mates that do not lack its elements, and how many these are.
    :param blocks: into how many blocks of the source the cell falls, see `grains`.
    :param volume: elements of the cell.
    """
    base = Ring(mates)
    rings = [base.less(having) if total else None for having, total in lacked]
    made: list[Course | None] = []
    load = [(0, place) for place in range(len(mates))]  # elements in which each mate was last: a heap
    for ring, (_, total) in zip(rings, lacked, strict=True):
        if ring is None or not ring.size:
            made.append(None)
            continue
        division = Division(total, min(ring.size, -(-blocks * total // volume)))
        alone = ring.size == 1
        lasts = [0] if alone else [ring.place(mates[place]) for place in _least(load, mates, ring, division)]
        made.append(Course(ring, division, lasts))
    return made


def grains(blocks: int, nbytes: int) -> int:
    """Return into how many ranges what comes in so many blocks, of so many bytes together, may be cut."""
    return max(blocks, min(_SPREAD, nbytes // GRAIN))


def _least(load: list[tuple[int, int]], mates: Sequence[int], ring: Ring, division: Division) -> list[int]:
    """Return the places of those mates of a ring that were last in the fewest elements, one for each range."""
    chosen: list[int] = []
    passed: list[tuple[int, int]] = []
    while len(chosen) < division.parts:
        count, place = heapq.heappop(load)
        if mates[place] in ring:
            passed.append((count + division.length(len(chosen)), place))
            chosen.append(place)
        else:
            passed.append((count, place))
    for each in passed:
        heapq.heappush(load, each)
    return chosen
