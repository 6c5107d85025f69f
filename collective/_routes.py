"""Which element goes over which ranks on its way from one layout to another: what every rank finds out alone.

A *pair* is a cell of the source and a cell of the destination that share elements. What of it a destination lacks goes
on *routes*: from one rank that has it to the first of those that lack it on one host, and on from there along a tree.
Both choices follow the element's position in its cell, cut into equal ranges: so ranks that hold the same elements
send the same number of them, and each finds its share without knowing the others'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from collective._boxes import Box, before, meet, part_of, ranges, shared

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collective._grids import Cell
    from collective.layouts import Layout

PLAIN, CONTRIBUTION, RESULT = range(3)
"""What a route carries: elements as they are; contributions to a reduction; what came out of one."""

GRAIN = 32 << 10
"""Bytes below which a block is not cut in two for the sake of its tree."""
_CHAIN = 8
"""The most ranks through which so small a block goes one after the other."""


class Route(NamedTuple):
    """The way of some elements: from `sender` to the first of `order`, and on along a tree in which each rank of it
    has `fan` children."""

    kind: int
    sender: int
    order: tuple[int, ...]
    fan: int

    def parent(self, rank: int) -> int:
        """Return from whom a rank of the order gets the elements."""
        place = self.order.index(rank)
        return self.order[(place - 1) // self.fan] if place else self.sender

    def children(self, rank: int) -> tuple[int, ...]:
        """Return to whom a rank passes the elements on; the sender has one child, the first of the order."""
        if rank == self.sender:
            return self.order[:1]
        first = self.order.index(rank) * self.fan + 1
        return self.order[first : first + self.fan]


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
class _Share:
    """How much of what leaves a source cell comes before a position in it.

    A cell is sent to `hosts` hosts, but for the blocks in `other`: (position, volume, to how many hosts fewer).
    """

    hosts: int
    other: list[tuple[int, int, int]]
    total: int

    def before(self, position: int) -> int:
        return self.hosts * position - sum(volume * fewer for at, volume, fewer in self.other if at < position)


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
        self._partial = src.partial is not None
        self._itemsize = itemsize
        self._hosts = hosts
        self._share = share
        self._shares: dict[Cell, _Share] = {}
        self._spread = self._usual_spread()

    def part(self, rank: int) -> Part:
        """Return what a rank does."""
        part = Part()
        held, wanted = self._src.cell_of(rank), self._dst.cell_of(rank)
        if held is not None:
            for cell, boxes in meet(self._src, held, self._dst, from_source=True):
                self._give(part, rank, held, cell, boxes)
        if wanted is not None and rank in self.takers(wanted):
            for cell, boxes in meet(self._dst, wanted, self._src, from_source=False):
                self._take(part, rank, cell, wanted, boxes)
        return part

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

    def _give(self, part: Part, rank: int, held: Cell, cell: Cell, boxes: list[Box]) -> None:
        if self._partial:
            for total, _ in self._reductions(held, cell, boxes):
                root = total.senders[-1]
                if rank != root and rank in total.senders[:-1]:
                    part.sends.setdefault(Route(CONTRIBUTION, rank, (root,), 1), []).append(total.box)
            return
        for route, box, start, stop in self._routes(held, cell, boxes):
            if route.sender == rank:
                part.sends.setdefault(route, []).extend(part_of(box, start, stop))

    def _take(self, part: Part, rank: int, cell: Cell, wanted: Cell, boxes: list[Box]) -> None:
        if not self._partial:
            if rank in self._src.copies(cell)[0]:
                part.keeps += boxes
                return
            for route, box, start, stop in self._routes(cell, wanted, boxes):
                if rank in route.order:
                    part.receives.setdefault(route, []).extend(part_of(box, start, stop))
            return
        for total, routes in self._reductions(cell, wanted, boxes):
            root = total.senders[-1]
            if rank == root:
                part.sums.append(Sum(total.box, total.senders[:-1]))
            for route in routes:
                if rank == root:
                    part.sends.setdefault(route, []).append(total.box)
                elif rank in route.order:
                    part.receives.setdefault(route, []).append(total.box)

    def _routes(self, held: Cell, wanted: Cell, boxes: list[Box]) -> Iterator[tuple[Route, Box, int, int]]:
        """Yield the routes of what a pair moves, each with a range of the elements of a box."""
        holders = self._src.copies(held)[0]
        takers = self.takers(wanted)
        if len(holders) == len(takers) == 1:
            if holders != takers:
                route = Route(PLAIN, holders[0], tuple(takers), 1)
                for box in boxes:
                    yield route, box, 0, box.volume
            return
        hosts = self._without(set(holders), takers)
        src_shape, dst_shape = self._src.shape_of(held), self._dst.shape_of(wanted)
        share = self._share_of(held) if len(holders) > 1 else None
        for box in boxes:
            volume = box.volume
            at = before(box.dst, box.shape, dst_shape)
            sent = share.before(before(box.src, box.shape, src_shape)) if share is not None else 0
            for number, (mates, lacking) in enumerate(hosts):
                for start, stop, order, fan in self._trees(mates, lacking, at, volume, _volume(dst_shape)):
                    if share is None:
                        yield Route(PLAIN, holders[0], order, fan), box, start, stop
                        continue
                    first = sent + number * volume + start
                    for low, high, who in ranges(first, stop - start, share.total, len(holders)):
                        yield Route(PLAIN, holders[who], order, fan), box, start + low, start + high

    def _reductions(self, held: Cell, wanted: Cell, boxes: list[Box]) -> Iterator[tuple[Sum, list[Route]]]:
        """Yield what of a pair is reduced where: the last of the senders is the root; and where its result goes."""
        contributions = self._src.copies(held)
        takers = self.takers(wanted)
        contributing = {rank for holders in contributions for rank in holders}
        roots = [rank for rank in takers if rank in contributing] or takers
        src_shape, dst_shape = self._src.shape_of(held), self._dst.shape_of(wanted)
        for box in boxes:
            at_src, at_dst = before(box.src, box.shape, src_shape), before(box.dst, box.shape, dst_shape)
            for start, stop, turn in self._turns(at_dst, box.volume, _volume(dst_shape), len(roots)):
                root = roots[turn]
                others = self._without({root}, takers)
                for low, high, who in ranges(at_src + start, stop - start, _volume(src_shape), len(contributions[0])):
                    senders = [root if root in holders else holders[who] for holders in contributions]
                    cuts = {start + low, start + high}
                    trees = [
                        tree
                        for mates, lacking in others
                        for tree in self._trees(mates, lacking, at_dst, box.volume, _volume(dst_shape))
                    ]
                    for first, last, _, _ in trees:
                        cuts |= {cut for cut in (first, last) if start + low < cut < start + high}
                    edges = sorted(cuts)
                    for begin, end in pairwise(edges):
                        routes = [
                            Route(RESULT, root, order, fan)
                            for first, last, order, fan in trees
                            if first <= begin and end <= last
                        ]
                        for piece in part_of(box, begin, end):
                            yield Sum(piece, (*senders, root)), routes

    def _trees(
        self, mates: list[int], lacking: set[int], at: int, volume: int, total: int
    ) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
        """Yield (start, stop, order, fan) of a block at a position of a destination cell, for those mates who lack it.

        A range of it goes in two halves through two trees that run in opposite directions: a rank that passes on in one
        is a leaf in the other (Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast", 2009).
        The order turns with the position, so that over a cell all pass on the same.
        """
        if len(lacking) == 1:
            yield 0, volume, tuple(lacking), 1
            return
        for start, stop, turn in self._turns(at, volume, total, len(mates)):
            order = tuple([rank for rank in (*mates[turn:], *mates[:turn]) if rank in lacking])
            middle = (start + stop) // 2
            if start == middle or ((stop - start) * self._itemsize < GRAIN and len(order) <= _CHAIN):
                yield start, stop, order, 1 if len(order) <= _CHAIN else 2
            else:
                yield start, middle, order, 2
                yield middle, stop, order[::-1], 2

    def _turns(self, at: int, volume: int, total: int, parts: int) -> Iterator[tuple[int, int, int]]:
        if volume == total and volume * self._itemsize < GRAIN:
            yield 0, volume, 0  # a small cell that comes in one block
        else:
            yield from ranges(at, volume, total, parts)

    def _without(self, holders: set[int], takers: list[int]) -> list[tuple[list[int], set[int]]]:
        """Return, for each host where some takers are not among the holders, all of its takers and those some."""
        groups = [(mates, set(mates) - holders) for mates in self.by_host(takers)]
        return [(mates, lacking) for mates, lacking in groups if lacking]

    def _usual_spread(self) -> int | None:
        """Return on how many hosts every destination cell is wanted, or None where that differs."""
        if self._hosts is None:
            return 1
        spreads = {len(self.by_host(self._dst.copies(cell)[0])) for cell in self._dst.cells}
        return spreads.pop() if len(spreads) == 1 else None

    def _share_of(self, held: Cell) -> _Share:
        share = self._shares.get(held)
        if share is None:
            share = self._shares[held] = self._find_share(held)
        return share

    def _find_share(self, held: Cell) -> _Share:
        holders = self._src.copies(held)[0]
        spread = self._spread
        if spread is not None:  # only where a holder wants something itself is it otherwise
            wanting = {cell for cell in map(self._dst.cell_of, holders) if cell is not None}
            pairs = [(cell, shared(self._src, held, self._dst, cell)) for cell in wanting]
        else:
            spread, pairs = 1, list(meet(self._src, held, self._dst, from_source=True))
        shape = self._src.shape_of(held)
        other = []
        for wanted, boxes in pairs:
            fewer = spread - len(self._without(set(holders), self.takers(wanted)))
            if fewer:
                other += [(before(box.src, box.shape, shape), box.volume, fewer) for box in boxes]
        total = spread * _volume(shape) - sum(volume * fewer for _, volume, fewer in other)
        return _Share(spread, other, total)


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for length in shape:
        volume *= length
    return volume
