"""Which element goes over which ranks on its way from one layout to another: what every rank finds out alone.

A *pair* is a cell of the source and a cell of the destination that share elements. What of it a destination lacks goes
on *routes*: from one rank that has it to one of those that lack it on one host, and on from there through these. Both
choices follow the element's position among those that the same ranks send, or lack, cut into equal ranges: so ranks
that hold the same elements send the same number of them, and each finds its share without knowing the others'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._boxes import meet
from collective._moving import Moving
from collective._pairs import Part
from collective._summing import Summing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._grids import Cell
    from collective.layouts import Layout


class Router:
    """Finds the part of each rank in moving from one layout to another.

    :param itemsize: bytes of an element.
    :param hosts: the host of each group-local rank; None where all are on one.
    :param share: let one rank on each host, for each cell, take what all of them will look at.
    """

    def __init__(
        self, src: Layout, dst: Layout, *, itemsize: int, hosts: Sequence[str] | None = None, share: bool = False
    ) -> None:
        self._src = src.grid
        self._dst = dst.grid
        kind = Moving if src.partial is None else Summing
        self._pairs = kind(src, dst, itemsize=itemsize, hosts=hosts, share=share)

    def part(self, rank: int) -> Part:
        """Return what a rank does."""
        part = Part()
        held, wanted = self._src.cell_of(rank), self._dst.cell_of(rank)
        if held is not None:
            for cell, boxes in meet(self._src, held, self._dst, from_source=True):
                self._pairs.give(part, rank, held, cell, boxes)
        if wanted is not None and rank in self.takers(wanted):
            for cell, boxes in meet(self._dst, wanted, self._src, from_source=False):
                self._pairs.take(part, rank, cell, wanted, boxes)
        return part

    def takers(self, cell: Cell) -> list[int]:
        """Return the ranks that take a destination cell: all that want it, or one on each host where they share."""
        return self._pairs.takers(cell)

    def by_host(self, ranks: Sequence[int]) -> list[list[int]]:
        """Return ranks by their hosts."""
        return self._pairs.by_host(ranks)
