"""Who sends what to whom where elements move as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from collective._boxes import Box, before, meet, part_of
from collective._pairs import Pairs, Part, Share, volume_of
from collective._relays import courses
from collective._rings import PLAIN, Route
from collective._tallies import Division, Only, Tally

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._grids import Cell
    from collective._relays import Course
    from collective.layouts import Layout


@dataclass
class _Relay:
    """The ranks of one host that take a destination cell: the course for what nobody there has, and those by the source
    cell of which some have their part."""

    mates: Sequence[int]
    usual: Course | None
    tally: Tally
    known: dict[Cell, tuple[Course | None, Only]]

    def course(self, held: Cell) -> tuple[Course | None, Tally | Only]:
        return self.known.get(held) or (self.usual, self.tally)


class Moving(Pairs):
    """Elements go from one of those that hold them to one of those that lack them on each host, and on from there."""

    def __init__(
        self, src: Layout, dst: Layout, *, itemsize: int, hosts: Sequence[str] | None, share: bool
    ) -> None:
        super().__init__(src, dst, itemsize=itemsize, hosts=hosts, share=share)
        self._relays_of: dict[Cell, list[_Relay]] = {}
        self._share_of: dict[Cell, Share] = {}

    def give(self, part: Part, rank: int, held: Cell, cell: Cell, boxes: list[Box]) -> None:
        holders = self._src.copies(held)[0]
        number = 0
        for relay in self._relays(cell):
            course, tally = relay.course(held)
            if course is None:
                continue
            for box in boxes:
                low, high = 0, box.volume
                if len(holders) > 1:
                    share = self._share_in(held)
                    first = self._place(share, held, box) + number * box.volume
                    start, stop = share.of(holders.index(rank))
                    low, high = max(0, start - first), min(high, stop - first)
                if low < high:
                    at = tally.before(self._at(cell, box))
                    for start, stop, last, way in course.cut(at, low, high):
                        route = Route(PLAIN, rank, course.ring, last, way)
                        part.sends.setdefault(route, []).extend(part_of(box, start, stop))
            number += 1

    def take(self, part: Part, rank: int, held: Cell, wanted: Cell, boxes: list[Box]) -> None:
        holders = self._src.copies(held)[0]
        if rank in holders:
            part.keeps += boxes
            return
        number = 0
        for relay in self._relays(wanted):
            course, tally = relay.course(held)
            if rank in relay.mates:
                break
            number += course is not None
        assert course is not None
        share = self._share_in(held) if len(holders) > 1 else None
        for box in boxes:
            for start, stop, last, way in course.cut(tally.before(self._at(wanted, box)), 0, box.volume):
                if share is None:
                    route = Route(PLAIN, holders[0], course.ring, last, way)
                    part.receives.setdefault(route, []).extend(part_of(box, start, stop))
                    continue
                first = self._place(share, held, box) + number * box.volume
                for low, high, who in share.division.cut(first + start, first + stop):
                    route = Route(PLAIN, holders[who], course.ring, last, way)
                    part.receives.setdefault(route, []).extend(part_of(box, start + low, start + high))

    def _relays(self, cell: Cell) -> list[_Relay]:
        known = self._relays_of.get(cell)
        if known is None:
            hosts = self.by_host(self.takers(cell))
            known = self._relays_of[cell] = [self._relay(cell, mates) for mates in hosts]
        return known

    def _relay(self, cell: Cell, mates: Sequence[int]) -> _Relay:
        having: dict[Cell, list[int]] = {}
        for mate in mates:
            held = self._src.cell_of(mate)
            if held is not None:
                having.setdefault(held, []).append(mate)
        had = {held: [(self._at(cell, box), box.volume) for box in self._shared(held, cell)] for held in having}
        volume = volume_of(self._dst.shape_of(cell))
        tally = Tally(volume, fewer=[(at, size, 1) for blocks in had.values() for at, size in blocks])
        tallies = {held: Only(blocks) for held, blocks in had.items() if blocks}
        lacked = [((), tally.total), *((having[held], only.total) for held, only in tallies.items())]
        parts = self._parts(cell, mates) if len(mates) > 1 else 1
        usual, *others = courses(mates, lacked, parts, volume)
        return _Relay(mates, usual, tally, dict(zip(tallies, zip(others, tallies.values(), strict=True), strict=True)))

    def _share_in(self, held: Cell) -> Share:
        share = self._share_of.get(held)
        if share is None:
            share = self._share_of[held] = self._find_share(held)
        return share

    def _find_share(self, held: Cell) -> Share:
        holders = self._src.copies(held)[0]
        spread = self._spread
        if spread is not None:  # only where a holder wants something itself is it otherwise
            wanting = {cell: None for cell in map(self._dst.cell_of, holders) if cell is not None}
            pairs = [(cell, self._shared(held, cell)) for cell in wanting]
        else:
            spread, pairs = 1, list(meet(self._src, held, self._dst, from_source=True))
        shape = self._src.shape_of(held)
        fewer = []
        for wanted, boxes in pairs:
            lacking = sum(relay.course(held)[0] is not None for relay in self._relays(wanted)) if boxes else spread
            if lacking != spread:
                fewer += [(before(box.src, box.shape, shape), box.volume, spread - lacking) for box in boxes]
        tally = Tally(volume_of(shape), each=spread, fewer=fewer)
        return Share(tally, Division(tally.total, len(holders)))

    @cached_property
    def _spread(self) -> int | None:
        """On how many hosts every destination cell is wanted, or None where that differs."""
        if self._hosts is None:
            return 1
        spreads = {len({self._hosts[rank] for rank in self._dst.copies(cell)[0]}) for cell in self._dst.cells}
        return spreads.pop() if len(spreads) == 1 else None
