"""The order in which the rows of several producers follow one another. Pure: knows of counts alone.

A row of a producer has a turn: its number less the producer's origin, which is 0 where a pass begins at its beginning.
Rows are ordered by (turn, producer): the first row of each producer, then the second of each, and so on; a producer
that has no more is passed over. So the order is a function of the producers' row counts, and neither of the blocks in
which the rows came nor of time; and it can be cut and gone on with anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Run(NamedTuple):
    """Rows `first` to `first + rows` of a producer, which go to the places `at`, `at + stride`, ... of a stretch."""

    producer: int
    first: int
    rows: int
    at: int
    stride: int


class Announced:
    """How many rows each producer has said it has, and which of them will have no more."""

    def __init__(self, positions: Sequence[int]) -> None:
        self.ends = list(positions)
        self.open = [True] * len(self.ends)

    def announce(self, producer: int, end: int, *, closed: bool = False) -> None:
        """Take note that a producer's rows up to `end` are there; `closed`: that these are all."""
        if end < self.ends[producer] or (not self.open[producer] and end > self.ends[producer]):
            raise ValueError(f"producer {producer} announced {end} rows after {self.ends[producer]}")
        self.ends[producer] = end
        if closed:
            self.open[producer] = False


class Cursor:
    """A place in the order. It goes on by stretches of rows that are determined; see `known`."""

    def __init__(self, announced: Announced, positions: Sequence[int], origins: Sequence[int]) -> None:
        self._announced = announced
        self._origins = tuple(origins)
        self.positions = list(positions)
        """The next row of each producer."""

    def known(self) -> int:
        """Return how many rows from here on are determined: nothing that is announced later can come between them."""
        ends, origins = self._announced.ends, self._origins
        # The first row that may come and is not there: all before it are determined.
        missing = min(
            ((ends[p] - origins[p], p) for p, is_open in enumerate(self._announced.open) if is_open),
            default=None,
        )
        if missing is None:
            return sum(ends) - sum(self.positions)
        turn, first = missing
        count = 0
        for p, position in enumerate(self.positions):
            last = min(ends[p], turn + (p < first) + origins[p])
            if last > position:
                count += last - position
        return count

    def take(self, count: int) -> list[Run]:
        """Go on by `count` rows, which must be known, and return where in that stretch each producer's rows are."""
        runs: list[list[int]] = []
        last: dict[int, list[int]] = {}
        at = 0
        while at < count:
            giving, cycles = self._cycles()
            cycles = min(cycles, (count - at) // len(giving))
            if cycles == 0:
                giving, cycles = giving[: count - at], 1
            for offset, p in enumerate(giving):
                self._extend(runs, last, [p, self.positions[p], cycles, at + offset, len(giving)])
                self.positions[p] += cycles
            at += cycles * len(giving)
        return [Run(p, first, n, place, stride) for p, first, n, place, stride in runs]

    def _cycles(self) -> tuple[list[int], int]:
        """Return who gives a row in the next row's turn, and for how many turns these will be the same."""
        ends, origins = self._announced.ends, self._origins
        turns = {p: at - origins[p] for p, at in enumerate(self.positions) if at < ends[p]}
        turn = min(turns.values())
        giving = [p for p, its in turns.items() if its == turn]
        lasting = min(ends[p] - self.positions[p] for p in giving)
        joining = min((its for its in turns.values() if its > turn), default=turn + lasting)
        return giving, min(lasting, joining - turn)

    def _extend(self, runs: list[list[int]], last: dict[int, list[int]], run: list[int]) -> None:
        """Add a run, as part of the one before it of the same producer where it goes on at the same stride."""
        p, _, count, at, stride = run
        before = last.get(p)
        if before is not None:
            gap = at - (before[3] + (before[2] - 1) * before[4] if before[2] > 1 else before[3])
            if (before[2] == 1 or gap == before[4]) and (count == 1 or gap == stride):
                before[2] += count
                before[4] = gap
                return
        last[p] = run
        runs.append(run)
