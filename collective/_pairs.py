"""What two layouts have to do with each other, pair by pair: a cell of the source and one of the destination that share
elements. Subclasses find out who sends what of a pair to whom.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from collective._boxes import Box, before, count, shared
from collective._relays import grains

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._grids import Cell
    from collective._rings import Route
    from collective._tallies import Division, Tally
    from collective.layouts import Layout


class Sum(NamedTuple):
    """Elements that a rank reduces, and which rank contributes each operand; it may be that rank itself."""

    box: Box
    senders: tuple[int, ...]


@dataclass
class Part:
    """What one rank does in a plan. Boxes are in the order in which their elements travel.

    :ivar keeps: what it has already: source and destination are in this rank.
    :ivar sends: by route, what it takes out of its source, or, on a route of kind RESULT, out of its destination.
    :ivar receives: by route, what it puts into its destination and passes on to its children.
    :ivar sums: what it reduces into its destination, before it sends on the routes of kind RESULT.
    """

    keeps: list[Box] = field(default_factory=list)
    sends: dict[Route, list[Box]] = field(default_factory=dict)
    receives: dict[Route, list[Box]] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)


@dataclass
class Share:
    """What leaves a source cell, counted in an order, and its division among those that hold it.

    :ivar tally: counts it by the position in the cell, but for what is in `starts`.
    :ivar starts: by destination cell and number of a range of it, where that begins; None where it is not sent.
    """

    tally: Tally
    division: Division
    starts: dict[tuple[Cell, int], int | None] = field(default_factory=dict)

    def of(self, number: int) -> tuple[int, int]:
        """Return from where to where what one of those that hold it sends is counted."""
        return self.division.start(number), self.division.start(number + 1)


class Pairs(ABC):
    """Finds out what one rank does for a pair.

    :param itemsize: bytes of an element.
    :param hosts: the host of each group-local rank; None where all are on one.
    :param share: let one rank on each host, for each cell, take what all of them will look at.
    """

    def __init__(
        self, src: Layout, dst: Layout, *, itemsize: int, hosts: Sequence[str] | None, share: bool
    ) -> None:
        self._src = src.grid
        self._dst = dst.grid
        self._itemsize = itemsize
        self._hosts = hosts
        self._share = share
        self._blocks_of: dict[Cell, int] = {}

    @abstractmethod
    def give(self, part: Part, rank: int, held: Cell, cell: Cell, boxes: list[Box]) -> None:
        """Add what a rank that holds a source cell sends of it to those that take a destination cell."""

    @abstractmethod
    def take(self, part: Part, rank: int, held: Cell, wanted: Cell, boxes: list[Box]) -> None:
        """Add what a rank that takes a destination cell does for what a source cell has of it."""

    def takers(self, cell: Cell) -> list[int]:
        """Return the ranks that take a destination cell: all that want it, or one on each host where they share."""
        ranks = self._dst.copies(cell)[0]
        return [mates[0] for mates in self.by_host(ranks)] if self._share else ranks

    def by_host(self, ranks: Sequence[int]) -> list[list[int]]:
        """Return ranks by their hosts."""
        if self._hosts is None:
            return [list(ranks)] if ranks else []
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            groups.setdefault(self._hosts[rank], []).append(rank)
        return list(groups.values())

    # ----------------------------------------------------------- arithmetic

    def _place(self, share: Share, held: Cell, box: Box) -> int:
        return share.tally.before(before(box.src, box.shape, self._src.shape_of(held)))

    def _at(self, cell: Cell, box: Box) -> int:
        return before(box.dst, box.shape, self._dst.shape_of(cell))

    def _shared(self, held: Cell, wanted: Cell) -> list[Box]:
        return shared(self._src, held, self._dst, wanted)

    def _parts(self, cell: Cell, takers: Sequence[int]) -> int:
        """Return into how many ranges a destination cell may be cut."""
        if all(self._src.cell_of(taker) is None for taker in takers):
            blocks = count(self._dst, cell, self._src, most=len(takers))
        elif (known := self._blocks_of.get(cell)) is not None:
            blocks = known
        else:
            blocks = self._blocks_of[cell] = count(self._dst, cell, self._src)
        return grains(blocks, volume_of(self._dst.shape_of(cell)) * self._itemsize)


def volume_of(shape: Sequence[int]) -> int:
    """Return how many elements a shape has."""
    volume = 1
    for length in shape:
        volume *= length
    return volume
