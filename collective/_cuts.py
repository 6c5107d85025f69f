"""How one dimension of a tensor is cut: chains of levels, one for each mesh dimension that shards it.

Each level cuts what the level above left of the dimension, in positions that count from 0 there. All is arithmetic: to
find who holds some positions costs what they are spread over, not what the mesh has.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Span(NamedTuple):
    """Neighbouring positions of the whole dimension that are neighbours in one part of it, too."""

    part: tuple[int, ...]
    """The part's mesh coordinates, one a level."""
    whole: int
    local: int
    length: int


class Level:
    """One cut into `parts` parts, as torch.chunk cuts.

    :param splits: the parts' lengths, where they are given.
    :param factor: how many pieces are cut first, each of which is then cut into all parts (torch's _StridedShard).
    """

    __slots__ = ("factor", "parts", "splits", "starts")

    def __init__(self, parts: int, splits: Sequence[int] | None = None, factor: int = 1) -> None:
        self.parts = parts
        self.factor = factor
        self.splits = None if splits is None else tuple(splits)
        self.starts = None if splits is None else (0, *accumulate(splits))

    def runs(self, length: int, part: int) -> Iterator[tuple[int, int]]:
        """Yield (start, length) of what a part takes of `length` positions, in its order."""
        if self.starts is not None:
            yield self.starts[part], self.starts[part + 1] - self.starts[part]
            return
        outer = _chunk(length, self.factor)
        for start in range(0, length, outer or 1):
            piece = min(outer, length - start)
            inner = _chunk(piece, self.parts)
            first = min(piece, part * inner)
            yield start + first, min(inner, piece - first)

    def find(self, length: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (part, position here, position in the part, length) of each run that covers some of start to stop."""
        if self.starts is not None:
            yield from self._find_split(start, stop)
            return
        outer = _chunk(length, self.factor)
        inner = _chunk(outer, self.parts)
        while start < stop:
            piece = start // outer
            base = piece * outer
            size = min(outer, length - base)
            chunk = _chunk(size, self.parts)
            part = (start - base) // chunk
            begin = base + part * chunk
            end = min(begin + chunk, base + size, stop)
            before = piece * min(inner, max(0, outer - part * inner))  # of the pieces before, all of them whole
            yield part, start, before + start - begin, end - start
            start = end

    def _find_split(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        assert self.starts is not None
        while start < stop:
            part = bisect_right(self.starts, start) - 1
            end = min(self.starts[part + 1], stop)
            yield part, start, start - self.starts[part], end - start
            start = end


class Cut:
    """How a dimension of some length is cut by a chain of levels."""

    __slots__ = ("length", "levels")

    def __init__(self, length: int, levels: Sequence[Level]) -> None:
        self.length = length
        self.levels = tuple(levels)

    def spans(self, part: tuple[int, ...]) -> list[Span]:
        """Return what a part holds, in its order."""
        runs = [(0, self.length)]
        for level, coordinate in zip(self.levels, part, strict=True):
            runs = _take(runs, level, coordinate)
        spans, local = [], 0
        for start, length in runs:
            spans.append(Span(part, start, local, length))
            local += length
        return spans

    def length_of(self, part: tuple[int, ...]) -> int:
        """Return how many positions a part holds."""
        length = self.length
        for level, coordinate in zip(self.levels, part, strict=True):
            length = sum(size for _, size in level.runs(length, coordinate))
        return length

    def check(self) -> None:
        """Raise ValueError where the splits of a level do not sum to what they cut."""
        lengths = {self.length}
        if all(level.splits is None for level in self.levels):
            return
        for level in self.levels:
            for length in lengths:
                if level.splits is not None and sum(level.splits) != length:
                    raise ValueError(f"splits {level.splits} sum to {sum(level.splits)}, and cut {length} positions")
            parts = range(level.parts)
            lengths = {sum(size for _, size in level.runs(length, part)) for length in lengths for part in parts}

    def find(self, start: int, stop: int) -> Iterator[Span]:
        """Yield who holds the positions from start to stop."""
        yield from self._find((), self.length, start, start, stop)

    def _find(self, part: tuple[int, ...], length: int, whole: int, start: int, stop: int) -> Iterator[Span]:
        depth = len(part)
        if depth == len(self.levels):
            yield Span(part, whole, start, stop - start)
            return
        level = self.levels[depth]
        for coordinate, here, local, size in level.find(length, start, stop):
            below = sum(run for _, run in level.runs(length, coordinate)) if depth + 1 < len(self.levels) else 0
            yield from self._find((*part, coordinate), below, whole + here - start, local, local + size)


def _chunk(length: int, parts: int) -> int:
    return -(-length // parts)


def _take(runs: list[tuple[int, int]], level: Level, part: int) -> list[tuple[int, int]]:
    """Return the runs of a part of what other runs hold; empty ones are left out."""
    length = sum(size for _, size in runs)
    ends = list(accumulate(size for _, size in runs))
    taken: list[tuple[int, int]] = []
    for start, size in level.runs(length, part):
        stop = start + size
        while start < stop:
            number = bisect_right(ends, start)
            here = start - ends[number] + runs[number][1]
            count = min(runs[number][1] - here, stop - start)
            begin = runs[number][0] + here
            if taken and sum(taken[-1]) == begin:
                taken[-1] = (taken[-1][0], taken[-1][1] + count)
            else:
                taken.append((begin, count))
            start += count
    return taken
