"""Which rows make up which round, as each consumer finds out alone, from what the producers announced. Pure.

A round is one batch for each consumer, and is given out only once all its rows are announced. Two orders:

- "round-robin": a round is the next rows of the one order of all rows (`order`), cut into a batch for each consumer.
- "arrival": a round is the next rows of one producer. Each consumer takes the producers' rounds as it hears of them,
  maybe in another order than the others; but each round has a batch for every consumer, so that the counts are equal
  without anybody deciding on an order. What is left of each producer at its end is dealt round robin.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from collective._rows.order import Announced, Cursor, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

Order: TypeAlias = Literal["round-robin", "arrival"]
Tail: TypeAlias = Literal["drop", "pad", "error"]
Positions: TypeAlias = tuple[int, ...]
"""The next row of each producer."""


@dataclass(frozen=True)
class Round:
    """One consumer's batch of a round.

    :param runs: where its rows come from, in the order in which each producer's rows follow one another.
    :param rows: how many rows it has, without padding.
    :param moves: the producers' positions after the round, of those that it moves.
    """

    runs: tuple[Run, ...]
    rows: int
    moves: dict[int, int] = field(repr=False)

    def wanted(self) -> dict[int, tuple[int, int]]:
        """Return the rows, first and end, that it takes from each producer; they follow one another in each."""
        spans: dict[int, tuple[int, int]] = {}
        for run in self.runs:
            first, _ = spans.get(run.producer, (run.first, 0))
            spans[run.producer] = (first, run.first + run.rows)
        return spans

    def within(self, end: Positions) -> bool:
        """Whether it comes before an end of the stream."""
        return all(position <= end[p] for p, position in self.moves.items())


class Ledger:
    """One consumer's account of a stream.

    :param me: its number among the consumers.
    :param positions: the first row of each producer.
    :param origins: what the producers' turns are counted from; see `order`.
    """

    def __init__(
        self,
        positions: Sequence[int],
        origins: Sequence[int],
        *,
        consumers: int,
        batch: int,
        me: int,
        order: Order,
        tail: Tail,
    ) -> None:
        self._announced = Announced(positions)
        self._consumers = consumers
        self._batch = batch
        self._me = me
        self._tail = tail
        self._planned = list(positions)
        self._cursor = Cursor(self._announced, positions, origins) if order == "round-robin" else None
        self._arrived: deque[int] = deque()
        """The producers of announced rounds, in the order of arrival: rounds of one producer each."""
        self._queued = list(positions)
        self._end: Positions | None = None
        self.left = 0
        """Rows that did not fill a last round, once that is known."""

    @property
    def open(self) -> bool:
        """Whether some producer may announce more rows."""
        return any(self._announced.open)

    @property
    def ends(self) -> list[int]:
        """How many rows each producer has announced."""
        return self._announced.ends

    def announce(self, producer: int, end: int, *, closed: bool = False) -> None:
        """Take note of rows that a producer has; `closed`: of all that it will have."""
        self._announced.announce(producer, end, closed=closed)
        if self._cursor is None:
            while self._queued[producer] + self._size <= end:
                self._queued[producer] += self._size
                self._arrived.append(producer)

    def cut(self, end: Positions) -> None:
        """Plan no round beyond an end on which the consumers agreed."""
        self._end = end

    def exhausted(self) -> bool:
        """Whether no round will come any more."""
        if self._end is not None and all(at >= end for at, end in zip(self._planned, self._end, strict=True)):
            return True
        if self.open or self._arrived:
            return False
        left = sum(self.ends) - sum(self._planned)
        if left >= self._size or (left and self._tail == "pad"):
            return False
        self.left = left
        return True

    def next_round(self) -> Round | None:
        """Plan the next round and return this consumer's batch of it; None where it is not all announced yet."""
        if self.exhausted():
            return None
        while self._arrived:
            p = self._arrived.popleft()
            first = self._planned[p]
            if self._end is None or first + self._size <= self._end[p]:
                self._planned[p] = first + self._size
                run = Run(p, first + self._me * self._batch, self._batch, 0, 1)
                return Round((run,), self._batch, {p: self._planned[p]})
        if self._cursor is None:
            if self.open:
                return None
            # What is left of each producer has turns of its own: the rows before it were not dealt by turns.
            self._cursor = Cursor(self._announced, self._planned, self._planned)
        known = self._cursor.known()
        if known >= self._size:
            return self._deal([self._batch] * self._consumers)
        if self.open or not known or self._tail != "pad":
            return None
        share, more = divmod(known, self._consumers)
        return self._deal([share + (number < more) for number in range(self._consumers)])

    @property
    def _size(self) -> int:
        return self._consumers * self._batch

    def _deal(self, counts: list[int]) -> Round:
        """Take a round off the cursor; `counts`: the rows of each consumer."""
        assert self._cursor is not None
        self._cursor.take(sum(counts[: self._me]))
        runs = self._cursor.take(counts[self._me])
        self._cursor.take(sum(counts[self._me + 1 :]))
        self._planned = list(self._cursor.positions)
        return Round(tuple(runs), counts[self._me], dict(enumerate(self._planned)))


def furthest(places: Sequence[Positions]) -> Positions:
    """Return the end of a stream of which each consumer has given out so much."""
    return tuple(max(each) for each in zip(*places, strict=True))


def nearest(places: Sequence[Positions]) -> Positions:
    """Return what all consumers have come to, of whom each has come to one place."""
    return tuple(min(each) for each in zip(*places, strict=True))
