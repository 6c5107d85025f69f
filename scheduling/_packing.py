"""Vector bin packing in whole numbers, as far as feasibility needs it.

Items alike form an `ItemClass`, bins alike a `BinKind`; a gang has few of either, so that thousands of actors on
thousands of nodes cost little.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Size: TypeAlias = tuple[int, ...]

_SEARCHED = 64
"""Items, and bins, up to which the exact search is tried."""


@dataclass(frozen=True)
class ItemClass:
    """`count` items of one size, each of which may go into bins of these kinds."""

    count: int
    size: Size
    kinds: frozenset[int]


@dataclass(frozen=True)
class BinKind:
    """`count` bins of one capacity."""

    count: int
    capacity: Size


class Overflow(NamedTuple):
    """Proof that some items can never fit.

    :param classes: indices of the classes concerned.
    :param dimension: the one in which their sum is too much, or None where items are counted.
    :param needed: that sum, or their number.
    :param room: what there is of it, or how many of them fit.
    """

    classes: tuple[int, ...]
    dimension: int | None
    needed: int
    room: int


def fits(size: Size, capacity: Size) -> bool:
    """Return whether one item fits an empty bin."""
    return all(map(int.__le__, size, capacity))


def how_many(size: Size, capacity: Size, most: int) -> int:
    """Return how many items of one size fit one bin, up to `most`."""
    return min((have // need for need, have in zip(size, capacity, strict=True) if need), default=most)


def greedy_packs(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> bool:
    """Return whether first-fit decreasing packs everything, into small bins first or into large bins first."""
    largest = [max((kind.capacity[d] for kind in kinds), default=0) for d in range(len(classes[0].size))]

    def relative(size: Size) -> float:
        return max((part / whole for part, whole in zip(size, largest, strict=True) if whole), default=0.0)

    # Choosy classes first, then large ones.
    ordered = sorted(classes, key=lambda c: (len(c.kinds), -relative(c.size), c.size))
    by_room = sorted(range(len(kinds)), key=lambda k: (relative(kinds[k].capacity), kinds[k].capacity))
    return _first_fit(ordered, kinds, by_room) or _first_fit(ordered, kinds, by_room[::-1])


def _first_fit(classes: Sequence[ItemClass], kinds: Sequence[BinKind], order: Sequence[int]) -> bool:
    bins = [(k, list(kinds[k].capacity)) for k in order for _ in range(kinds[k].count)]
    for items in classes:
        left = items.count
        for kind, room in bins:
            if not left:
                break
            if kind in items.kinds:
                placed = min(left, how_many(items.size, tuple(room), left))
                left -= placed
                for d, need in enumerate(items.size):
                    room[d] -= placed * need
        if left:
            return False
    return True


def find_overflow(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> Overflow | None:
    """Return a counting argument that the items cannot fit, the plainest first; None where none known here applies."""
    return next(chain(_by_sum(classes, kinds), _by_class(classes, kinds), _by_large(classes, kinds)), None)


def _by_sum(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> Iterator[Overflow]:
    for asking, allowed, d in _asking(classes):
        needed = sum(classes[c].count * classes[c].size[d] for c in asking)
        room = sum(kinds[k].count * kinds[k].capacity[d] for k in allowed)
        if needed > room:
            yield Overflow(asking, d, needed, room)


def _by_class(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> Iterator[Overflow]:
    for c, items in enumerate(classes):
        room = sum(kinds[k].count * how_many(items.size, kinds[k].capacity, items.count) for k in items.kinds)
        if room < items.count:
            yield Overflow((c,), None, items.count, room)


def _by_large(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> Iterator[Overflow]:
    """Items of at least `least` each need as much: a bin holds no more than capacity // least of them."""
    for asking, allowed, d in _asking(classes):
        for least in sorted({classes[c].size[d] for c in asking}):
            large = tuple(c for c in asking if classes[c].size[d] >= least)
            needed = sum(classes[c].count for c in large)
            room = sum(kinds[k].count * (kinds[k].capacity[d] // least) for k in allowed)
            if needed > room:
                yield Overflow(large, None, needed, room)


def _asking(classes: Sequence[ItemClass]) -> Iterator[tuple[tuple[int, ...], frozenset[int], int]]:
    """Yield, for each set of kinds and each dimension, the classes that are bound to these kinds and take of it."""
    sets = dict.fromkeys(items.kinds for items in classes)
    sets[frozenset[int]().union(*sets)] = None
    for allowed in sets:
        inside = [c for c, items in enumerate(classes) if items.kinds <= allowed]
        for d in range(len(classes[0].size)):
            asking = tuple(c for c in inside if classes[c].size[d])
            if asking:
                yield asking, allowed, d


class _GaveUp(Exception):
    pass


def search_packs(classes: Sequence[ItemClass], kinds: Sequence[BinKind], *, budget: int = 20_000) -> bool | None:
    """Return whether the items fit, by trying; None where that takes more than `budget` placements."""
    items = [index for index, c in enumerate(classes) for _ in range(c.count)] if _small(classes, kinds) else []
    if not items:
        return None
    items.sort(key=lambda index: (len(classes[index].kinds), [-part for part in classes[index].size], index))
    bin_kinds = [k for k, kind in enumerate(kinds) for _ in range(kind.count)]
    rooms = [kinds[k].capacity for k in bin_kinds]
    spent = 0

    def place(at: int, first: int) -> bool:
        """Place items from `at` on; alike items go to bins in ascending order, from `first` on."""
        nonlocal spent
        if at == len(items):
            return True
        item = classes[items[at]]
        tried: set[tuple[int, Size]] = set()
        for b in range(first, len(rooms)):
            room = rooms[b]
            alike = (bin_kinds[b], room)
            if bin_kinds[b] not in item.kinds or alike in tried or not fits(item.size, room):
                continue
            tried.add(alike)
            spent += 1
            if spent > budget:
                raise _GaveUp
            rooms[b] = tuple(map(int.__sub__, room, item.size))
            if place(at + 1, b if items[at + 1 : at + 2] == items[at : at + 1] else 0):
                return True
            rooms[b] = room
        return False

    try:
        return place(0, 0)
    except _GaveUp:
        return None


def _small(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> bool:
    return sum(c.count for c in classes) <= _SEARCHED and sum(kind.count for kind in kinds) <= _SEARCHED


def match_apart(classes: Sequence[ItemClass], kinds: Sequence[BinKind]) -> Overflow | None:
    """Return None where each item can have a bin of its own, else those that there are too few bins for."""
    # Bins differ here only in which classes fit.
    bins: dict[frozenset[int], int] = {}
    for k, kind in enumerate(kinds):
        fitting = frozenset(c for c, items in enumerate(classes) if k in items.kinds)
        bins[fitting] = bins.get(fitting, 0) + kind.count
    crowded = _match(classes, list(bins), list(bins.values()))
    if crowded is None:
        return None
    room = sum(count for fitting, count in bins.items() if not fitting.isdisjoint(crowded))
    return Overflow(crowded, None, sum(classes[c].count for c in crowded), room)


def _match(classes: Sequence[ItemClass], fitting: list[frozenset[int]], free: list[int]) -> tuple[int, ...] | None:
    """Match items to bins by augmenting paths (a maximum flow); return the classes that violate Hall's condition."""
    flow = [[0] * len(free) for _ in classes]
    for start, items in enumerate(classes):
        left = items.count
        while left:
            # By class: the class that it was reached from, and the bins between.
            reached: dict[int, tuple[int, int] | None] = {start: None}
            end = _search_free(start, reached, fitting, free, flow)
            if end is None:
                return tuple(sorted(reached))
            c, k = end
            path: list[tuple[int, int, int]] = []  # `c` gives bins `k` to `before`
            while (step := reached[c]) is not None:
                path.append((step[0], step[1], c))
                c = step[0]
            moved = min([left, free[k], *(flow[giver][bins] for _, bins, giver in path)])
            left -= moved
            free[k] -= moved
            flow[end[0]][k] += moved
            for taker, bins, giver in path:
                flow[taker][bins] += moved
                flow[giver][bins] -= moved
    return None


def _search_free(
    start: int,
    reached: dict[int, tuple[int, int] | None],
    fitting: list[frozenset[int]],
    free: list[int],
    flow: list[list[int]],
) -> tuple[int, int] | None:
    """Search breadth-first for bins that are free, or become free by moving others; return them and who takes them."""
    seen: set[int] = set()
    queue = deque([start])
    while queue:
        c = queue.popleft()
        for k, allowed in enumerate(fitting):
            if c not in allowed or k in seen:
                continue
            seen.add(k)
            if free[k]:
                return c, k
            for other in range(len(flow)):
                if flow[other][k] and other not in reached:
                    reached[other] = (c, k)
                    queue.append(other)
    return None
