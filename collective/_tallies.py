"""Positions of elements among those of a cell that count, and their division into equal ranges."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Tally:
    """Counts the elements before a position of a cell, each so many times.

    :param volume: elements of the cell.
    :param each: how many times an element counts.
    :param fewer: (position, volume, how many times less) of blocks that count otherwise.
    """

    __slots__ = ("_at", "_each", "_sums", "total")

    def __init__(self, volume: int, *, each: int = 1, fewer: Iterable[tuple[int, int, int]] = ()) -> None:
        known = sorted(fewer)
        self._each = each
        self._at = [position for position, _, _ in known]
        self._sums = [0, *accumulate(size * times for _, size, times in known)]
        self.total = each * volume - self._sums[-1]

    def before(self, position: int) -> int:
        """Return how much counts before the block that begins at a position."""
        return self._each * position - self._sums[bisect_left(self._at, position)]


class Only:
    """Counts the elements before a position of a cell that lie in some blocks of it, (position, volume) each."""

    __slots__ = ("_at", "_sums", "total")

    def __init__(self, blocks: Iterable[tuple[int, int]]) -> None:
        known = sorted(blocks)
        self._at = [position for position, _ in known]
        self._sums = [0, *accumulate(size for _, size in known)]
        self.total = self._sums[-1]

    def before(self, position: int) -> int:
        """Return how much counts before the block that begins at a position."""
        return self._sums[bisect_left(self._at, position)]


class Division:
    """A total that is cut into equal ranges; the first ones are larger by one where it does not come out even."""

    __slots__ = ("_edge", "_larger", "_smaller", "parts", "total")

    def __init__(self, total: int, parts: int) -> None:
        self.total = total
        self.parts = parts
        self._smaller, more = divmod(total, parts)
        self._larger = self._smaller + 1
        self._edge = more * self._larger

    def start(self, part: int) -> int:
        """Return where a range begins; the one after the last begins at the total."""
        return part * self._smaller + min(part, self._edge // self._larger)

    def length(self, part: int) -> int:
        """Return how long a range is."""
        return self.start(part + 1) - self.start(part)

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, part) of what lies in each range, counted from the start."""
        at = start
        while at < stop:
            over = at - self._edge
            part = at // self._larger if over < 0 else self._edge // self._larger + over // self._smaller
            end = min(stop, self.start(part + 1))
            yield at - start, end - start, part
            at = end
