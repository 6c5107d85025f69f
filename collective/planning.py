"""Plans: the transfers that turn one layout of a tensor into another."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from collective._boxes import meet, shared
from collective._integers import integer
from collective._pairs import Part
from collective._rings import CONTRIBUTION, Route
from collective._routes import Router
from collective.layouts import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from collective._boxes import Box
    from collective._rings import Ring

CACHED = 1 << 19
"""Ranks of all plans that are kept, together. A plan takes up to about a kilobyte for each of its ranks, once one of
them has found out its part; a state dict has hundreds of tensors, and few kinds of them."""

_Key: TypeAlias = "tuple[Layout, Layout, int, tuple[str, ...] | None, bool]"


class Traffic(NamedTuple):
    """Bytes that a rank sends, receives, and keeps because it has them."""

    sent: int
    received: int
    kept: int


class Fairness(NamedTuple):
    """By how many bytes ranks that could do the same work differ at most, and the largest block, in bytes.

    These are: ranks that hold the same elements of the source, or the same contribution to them, in what they send of
    it; ranks of one host that lack the same elements, in what they pass on of them, and, where nothing is reduced, in
    all that they pass on, if they hold the same of the source, too, or nothing; such ranks in what they reduce.
    `difference` is never more than `block`, but where more than eight ranks of one host pass on: there each tree may
    add two elements.
    """

    difference: int
    block: int


class Plan:
    """The transfers that turn one layout of a tensor into another. `plan` makes them.

    What concerns one rank is found out when it is asked for, in time and memory proportional to that rank's transfers;
    `total`, `fairness`, `str` and `plot` ask for every rank.

    :ivar src, dst: the layouts.
    :ivar itemsize: bytes of an element.
    :ivar hosts: the host of each group-local rank; None where all are on one.
    :ivar share: whether the ranks of a host that hold the same share one copy.
    """

    def __init__(
        self, src: Layout, dst: Layout, *, itemsize: int, hosts: tuple[str, ...] | None, share: bool
    ) -> None:
        self.src = src
        self.dst = dst
        self.itemsize = itemsize
        self.hosts = hosts
        self.share = share
        self._router = Router(src, dst, itemsize=itemsize, hosts=hosts, share=share)
        self._parts: dict[int, Part] = {}

    @property
    def ranks(self) -> list[int]:
        """The ranks of either layout."""
        return sorted({*self.src.ranks, *self.dst.ranks})

    def part(self, rank: int) -> Part:
        """Return what a rank does; nothing, where it is in neither layout."""
        part = self._parts.get(rank)
        if part is None:
            part = self._parts[rank] = self._router.part(rank)
        return part

    def takes(self, rank: int) -> bool:
        """Whether a rank takes its part of the destination itself: all do, or one on each host where they share."""
        cell = self.dst.grid.cell_of(rank)
        return cell is not None and rank in self._router.takers(cell)

    def mates(self, rank: int) -> list[int]:
        """Return the ranks of a destination rank's host that get the same elements, itself included."""
        cell = self.dst.grid.cell_of(rank)
        groups = self._router.by_host(self.dst.grid.copies(cell)[0]) if cell is not None else []
        return next((mates for mates in groups if rank in mates), [])

    def outgoing(self, rank: int) -> dict[int, int]:
        """Return how many bytes a rank sends to which, those that it passes on included."""
        edges: dict[int, int] = {}
        part = self.part(rank)
        for route, boxes in (*part.sends.items(), *part.receives.items()):
            for child in route.children(rank):
                edges[child] = edges.get(child, 0) + self._bytes(boxes)
        return edges

    def traffic(self, rank: int) -> Traffic:
        """Return what a rank sends, receives and keeps."""
        part = self.part(rank)
        operands = sum(
            total.box.volume for total in part.sums for sender in total.senders if sender != rank
        )
        received = sum(map(self._bytes, part.receives.values())) + operands * self.itemsize
        return Traffic(sum(self.outgoing(rank).values()), received, self._bytes(part.keeps))

    @cached_property
    def total(self) -> int:
        """Bytes that are sent in all."""
        return sum(self.traffic(rank).sent for rank in self.ranks)

    @cached_property
    def lower_bound(self) -> int:
        """Bytes that any plan must send: what each destination lacks, and what meets in each reduction."""
        if self.src.partial is not None:
            return self.itemsize * sum(self._least(cell) for cell in self.dst.grid.cells)
        least = 0
        for rank in self.dst.ranks:
            held, wanted = self.src.grid.cell_of(rank), self.dst.grid.cell_of(rank)
            if wanted is not None and self.takes(rank):
                least += _volume(self.dst.grid.shape_of(wanted))
                if held is not None:
                    least -= sum(box.volume for box in shared(self.src.grid, held, self.dst.grid, wanted))
        return least * self.itemsize

    @cached_property
    def fairness(self) -> Fairness:
        """How evenly the work is divided among ranks that could each do it."""
        difference = block = 0
        for held in self.src.grid.cells:
            for _, boxes in meet(self.src.grid, held, self.dst.grid, from_source=True):
                block = max([block, *(box.volume for box in boxes)])
        block *= self.itemsize
        for cell in self.src.grid.cells:
            for holders in self.src.grid.copies(cell):
                difference = max(difference, _difference([self._leaves(rank) for rank in holders]))
        for cell in self.dst.grid.cells:
            takers = self._router.takers(cell)
            difference = max(difference, self._apart({rank: self._reduces(rank) for rank in takers}))
            for mates in self._router.by_host(takers):
                passed = {rank: self._passes_on(rank) for rank in mates}
                if self.src.partial is None:
                    in_all = {rank: sum(rings.values()) for rank, rings in passed.items()}
                    difference = max(difference, self._apart(in_all))
                for ring in {ring for rings in passed.values() for ring in rings}:
                    difference = max(difference, _difference([passed[rank].get(ring, 0) for rank in ring.ranks]))
        return Fairness(difference, block)

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Write the matrix of who sends how much to whom as an SVG picture."""
        from collective import _plots

        _plots.write(self, file)

    def __str__(self) -> str:
        from collective import _plots

        return _plots.text(self)

    def __repr__(self) -> str:
        return f"<Plan {self.src!r} -> {self.dst!r}, {self.itemsize} bytes an element>"

    def _bytes(self, boxes: Iterable[Box]) -> int:
        return sum(box.volume for box in boxes) * self.itemsize

    def _leaves(self, rank: int) -> int:
        """Bytes that a rank sends of what it holds of the source."""
        if self.src.partial is not None:
            sends = self.part(rank).sends
            return sum(self._bytes(boxes) for route, boxes in sends.items() if route.kind == CONTRIBUTION)
        return sum(map(self._bytes, self.part(rank).sends.values()))

    def _passes_on(self, rank: int) -> dict[Ring, int]:
        """Bytes that a rank passes on, by the ranks that lacked them."""
        passed: dict[Ring, int] = {}
        for route, boxes in self.part(rank).receives.items():
            count = len(route.children(rank)) * self._bytes(boxes)
            passed[route.ring] = passed.get(route.ring, 0) + count
        return passed

    def _reduces(self, rank: int) -> int:
        return self._bytes(total.box for total in self.part(rank).sums)

    def _apart(self, counts: Mapping[int, int]) -> int:
        """Return by how much ranks differ at most that hold the same of the source, or nothing."""
        alike: dict[object, list[int]] = {}
        for rank, count in counts.items():
            alike.setdefault(self.src.grid.cell_of(rank), []).append(count)
        return max(map(_difference, alike.values()), default=0)

    def _least(self, wanted: Any) -> int:
        """Elements that must be sent for one cell, where contributions meet on the way to those who want it."""
        takers = self._router.takers(wanted)
        least = 0
        for held, boxes in meet(self.dst.grid, wanted, self.src.grid, from_source=False):
            contributions = self.src.grid.copies(held)
            contributing = {rank for holders in contributions for rank in holders}
            both = any(rank in contributing for rank in takers)
            sends = len(contributions) + len(takers) - 1 - int(both)
            least += sends * sum(box.volume for box in boxes)
        return least


def plan(
    src: Layout, dst: Layout, *, itemsize: int = 1, hosts: Sequence[str] | None = None, share: bool = False
) -> Plan:
    """Return the plan that turns one layout into another. Pure and cached; every rank computes its own part alone.

    :param itemsize: bytes of an element; what a plan calls bytes are elements where this is 1.
    :param hosts: the host of each group-local rank, where they are on several: each gets what it lacks once.
    :param share: let the ranks of a host that get the same elements share one copy.

    Raises:
        TypeError, ValueError: these are no layouts of one shape, or the destination is Partial.
    """
    for name, layout in (("src", src), ("dst", dst)):
        if not isinstance(layout, Layout):
            raise TypeError(f"{name} is {layout!r}; a collective.Layout")
    itemsize = integer(itemsize, "itemsize")
    check(src, dst)
    known = None if hosts is None or len(set(hosts)) == 1 else tuple(hosts)
    last = max(src.last_rank, dst.last_rank)
    if known is not None and len(known) <= last:
        raise ValueError(f"{len(known)} hosts are given, and the layouts have ranks up to {last}")
    return _plans.get((src, dst, itemsize, known, share))


def check(src: Layout, dst: Layout, *, where: str = "") -> None:
    """Raise ValueError where one layout cannot turn into the other; `where` names the tensor."""
    if src.shape != dst.shape:
        raise ValueError(f"src{where} has the global shape {src.shape} and dst{where} {dst.shape}: {src!r} -> {dst!r}")
    if dst.partial is not None:
        raise ValueError(f"dst{where} is {dst!r}: only a source can be Partial; make it Replicate or Shard")


class _Plans:
    """The plans that were used last. In any thread."""

    def __init__(self) -> None:
        self._plans: OrderedDict[_Key, Plan] = OrderedDict()
        self._ranks = 0
        self._lock = threading.Lock()

    def get(self, key: _Key) -> Plan:
        """Return a plan, which is made where it is not there."""
        with self._lock:
            known = self._plans.get(key)
            if known is not None:
                self._plans.move_to_end(key)
                return known
            src, dst, itemsize, hosts, share = key
            made = self._plans[key] = Plan(src, dst, itemsize=itemsize, hosts=hosts, share=share)
            self._ranks += _ranks_of(made)
            while self._ranks > CACHED and len(self._plans) > 1:
                self._ranks -= _ranks_of(self._plans.popitem(last=False)[1])
            return made


def _ranks_of(plan: Plan) -> int:
    return len(plan.src.ranks) + len(plan.dst.ranks)


_plans = _Plans()


def _forget_all() -> None:
    global _plans
    _plans = _Plans()  # another thread of the parent may have held the lock


os.register_at_fork(after_in_child=_forget_all)


def _difference(numbers: Sequence[int]) -> int:
    return max(numbers, default=0) - min(numbers, default=0)


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for length in shape:
        volume *= length
    return volume


__all__ = ["Fairness", "Part", "Plan", "Route", "Traffic", "plan"]
