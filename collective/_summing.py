"""Who sends what to whom where elements are reduced on the way."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from collective._boxes import Box, before, part_of
from collective._pairs import Pairs, Part, Share, Sum, volume_of
from collective._reductions import Roots
from collective._relays import courses
from collective._rings import CONTRIBUTION, RESULT, Ring, Route
from collective._tallies import Division, Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collective._grids import Cell
    from collective._reductions import Piece
    from collective._relays import Course
    from collective.layouts import Layout


@dataclass
class _Results:
    """The ranks of one host that take a destination cell, to which results go: the course of each range of them, and
    where in that it begins."""

    mates: Sequence[int]
    courses: list[Course | None]
    starts: list[int]


class Summing(Pairs):
    """Contributions meet at a root for each element, and what comes out goes from there to all others that take it."""

    def __init__(
        self, src: Layout, dst: Layout, *, itemsize: int, hosts: Sequence[str] | None, share: bool
    ) -> None:
        super().__init__(src, dst, itemsize=itemsize, hosts=hosts, share=share)
        self._single = self._src.holders == 1
        self._results_of: dict[Cell, list[_Results]] = {}
        self._roots_of: dict[Cell, Roots] = {}
        self._shares_of: dict[Cell, list[Share | None]] = {}
        self._contribution_of: dict[int, int] = {}

    def give(self, part: Part, rank: int, held: Cell, cell: Cell, boxes: list[Box]) -> None:
        number = self._contribution(rank, held)
        holders = self._src.copies(held)[number]
        share = self._shares(held)[number]
        start, stop = (0, 0) if share is None else share.of(holders.index(rank))
        roots = self._roots(cell)
        for box in boxes:
            for piece in roots.cut(held, self._at(cell, box), box.volume):
                root = roots.ranges[piece.number][0]
                if root in holders:
                    continue
                low, high = piece.start, piece.stop
                if share is not None:
                    first = self._number(share, held, cell, box, piece)
                    low, high = max(low, low + start - first), min(high, low + stop - first)
                if low < high:
                    route = Route(CONTRIBUTION, rank, Ring((root,)))
                    part.sends.setdefault(route, []).extend(part_of(box, low, high))

    def _contribution(self, rank: int, held: Cell) -> int:
        """Return the number of the contribution to its cell that a rank holds."""
        number = self._contribution_of.get(rank)
        if number is None:
            number = next(n for n, holders in enumerate(self._src.copies(held)) if rank in holders)
            self._contribution_of[rank] = number
        return number

    def take(self, part: Part, rank: int, held: Cell, wanted: Cell, boxes: list[Box]) -> None:
        roots = self._roots(wanted)
        for box in boxes:
            for piece in roots.cut(held, self._at(wanted, box), box.volume):
                root = roots.ranges[piece.number][0]
                if root == rank:
                    for start, stop, senders in self._senders(held, wanted, box, piece, root):
                        part.sums += [Sum(each, senders) for each in part_of(box, start, stop)]
                for relay in self._results(wanted):
                    if root == rank or rank in relay.mates:
                        self._pass(part.sends if root == rank else part.receives, root, relay, box, piece)

    def _pass(self, onto: dict[Route, list[Box]], root: int, relay: _Results, box: Box, piece: Piece) -> None:
        course = relay.courses[piece.number]
        if course is not None:
            at = relay.starts[piece.number] + piece.position
            for start, stop, last, way in course.cut(at, 0, piece.stop - piece.start):
                route = Route(RESULT, root, course.ring, last, way)
                onto.setdefault(route, []).extend(part_of(box, piece.start + start, piece.start + stop))

    def _senders(
        self, held: Cell, wanted: Cell, box: Box, piece: Piece, root: int
    ) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield (start, stop, who contributes each operand) of a piece of a block."""
        contributions = self._src.copies(held)
        cuts: dict[int, list[tuple[int, int, int]]] = {}
        shares = zip(self._shares(held), contributions, strict=True)
        which = [share if root not in holders else None for share, holders in shares]
        for share in which:
            if share is not None and id(share) not in cuts:
                first = self._number(share, held, wanted, box, piece)
                cuts[id(share)] = list(share.division.cut(first, first + piece.stop - piece.start))
        edges = sorted({0, piece.stop - piece.start, *(stop for cut in cuts.values() for _, stop, _ in cut)})
        for start, stop in pairwise(edges):
            turn = {key: next(who for _, end, who in cut if end > start) for key, cut in cuts.items()}
            senders = [
                holders[turn[id(share)]] if share is not None else root if root in holders else holders[0]
                for share, holders in zip(which, contributions, strict=True)
            ]
            yield piece.start + start, piece.start + stop, tuple(senders)

    def _roots(self, cell: Cell) -> Roots:
        known = self._roots_of.get(cell)
        if known is None:
            takers = self.takers(cell)
            nearer: dict[Cell, list[int]] = {}
            alone = len(takers) == 1 and self._single  # it is the root of all, and nobody shares the sending
            for taker in takers if not alone else ():
                held = self._src.cell_of(taker)
                if held is not None:
                    nearer.setdefault(held, []).append(taker)
            blocks = {held: [(self._at(cell, box), box.volume) for box in self._shared(held, cell)] for held in nearer}
            both = {held: (ranks, blocks[held]) for held, ranks in nearer.items() if blocks[held]}
            volume = volume_of(self._dst.shape_of(cell))
            parts = self._parts(cell, takers) if len(takers) > 1 else 1
            known = self._roots_of[cell] = Roots(volume, takers, both, parts)
        return known

    def _results(self, cell: Cell) -> list[_Results]:
        known = self._results_of.get(cell)
        if known is None:
            takers = self.takers(cell)
            hosts = self.by_host(takers) if len(takers) > 1 else []
            known = self._results_of[cell] = [self._result(cell, mates) for mates in hosts]
        return known

    def _result(self, cell: Cell, mates: Sequence[int]) -> _Results:
        totals: dict[int | None, int] = {None: 0}
        keys, starts = [], []
        for root, size in self._roots(cell).ranges:
            key = root if root in mates else None
            keys.append(key)
            starts.append(totals.setdefault(key, 0))
            totals[key] += size
        lacked = [(() if key is None else (key,), total) for key, total in totals.items()]
        volume = volume_of(self._dst.shape_of(cell))
        made = dict(zip(totals, courses(mates, lacked, self._parts(cell, mates), volume), strict=True))
        return _Results(mates, [made[key] for key in keys], starts)

    def _shares(self, held: Cell) -> list[Share | None]:
        """Return how each contribution to a source cell is shared among those that hold it; None where one does."""
        known = self._shares_of.get(held)
        if known is None:
            contributions = self._src.copies(held)
            known = [None] * len(contributions)
            if not self._single:
                known = self._find_shares(held, contributions)
            self._shares_of[held] = known
        return known

    def _find_shares(self, held: Cell, contributions: list[list[int]]) -> list[Share | None]:
        shape = self._src.shape_of(held)
        ranks = [rank for holders in contributions for rank in holders]
        fewer, near = [], []
        for wanted in {cell: None for cell in map(self._dst.cell_of, ranks) if cell is not None}:
            roots = self._roots(wanted)
            if numbers := roots.near(held):
                boxes = self._shared(held, wanted)
                fewer += [(before(box.src, box.shape, shape), box.volume, 1) for box in boxes]
                near += [(wanted, number, *roots.ranges[number]) for number in numbers]
        tally = Tally(volume_of(shape), fewer=fewer)
        rooted = {root for _, _, root, _ in near}
        shares: list[Share | None] = []
        usual = None
        for holders in contributions:
            if usual is not None and rooted.isdisjoint(holders):
                shares.append(usual)
                continue
            total = tally.total
            starts: dict[tuple[Cell, int], int | None] = {}
            for wanted, number, root, size in near:
                starts[wanted, number] = None if root in holders else total
                total += 0 if root in holders else size
            share = Share(tally, Division(total, len(holders)), starts)
            usual = share if rooted.isdisjoint(holders) else usual
            shares.append(share)
        return shares

    def _number(self, share: Share, held: Cell, wanted: Cell, box: Box, piece: Piece) -> int:
        """Return the number of the first element of a piece among those that are sent."""
        start = share.starts.get((wanted, piece.number))
        return self._place(share, held, box) + piece.start if start is None else start + piece.position
