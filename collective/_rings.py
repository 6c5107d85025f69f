"""The trees over which ranks of one host pass elements on to each other, and the routes that use them.

Everything is arithmetic on a rank's place in a ring: what one rank does costs nothing that grows with the ring.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PLAIN, CONTRIBUTION, RESULT = range(3)
"""What a route carries: elements as they are; contributions to a reduction; what came out of one."""

CHAIN, LEFT, RIGHT = range(3)
"""The way through a ring: one rank after the other, or one of two trees that are used together."""

CHAINED = 8
"""The most ranks that make a chain: each passes on just what it got, and the way is no longer than through a tree."""


class Ring:
    """Ranks in an order, which comes round. A value; equal ones are told apart by nothing.

    :param ranks: the ranks, and their places by rank; several rings share these.
    :param without: the places of those that are left out.
    """

    __slots__ = ("_hash", "_places", "_ranks", "_without", "size")

    def __init__(
        self, ranks: Sequence[int], *, places: dict[int, int] | None = None, without: tuple[int, ...] = ()
    ) -> None:
        self._ranks = tuple(ranks)
        self._places = {rank: place for place, rank in enumerate(self._ranks)} if places is None else places
        self._without = without
        self._hash = hash((self._ranks[:1], len(self._ranks), without))
        self.size = len(self._ranks) - len(without)

    def less(self, ranks: Iterable[int]) -> Ring:
        """Return a ring without some of the ranks."""
        out = sorted(self._places[rank] for rank in ranks)
        if not out:
            return self
        if self._without or 2 * len(out) > self.size:
            gone = {self._ranks[place] for place in out}
            return Ring([rank for rank in self.ranks if rank not in gone])
        return Ring(self._ranks, places=self._places, without=tuple(out))

    @property
    def ranks(self) -> list[int]:
        """The ranks in their order."""
        if not self._without:
            return list(self._ranks)
        out = set(self._without)
        return [rank for place, rank in enumerate(self._ranks) if place not in out]

    def __getitem__(self, place: int) -> int:
        for out in self._without:
            if out > place:
                break
            place += 1
        return self._ranks[place]

    def place(self, rank: int) -> int:
        """Return the place of a rank that is in it."""
        place = self._places[rank]
        return place - bisect_left(self._without, place)

    def __contains__(self, rank: object) -> bool:
        place = self._places.get(rank) if isinstance(rank, int) else None
        return place is not None and place not in self._without

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Ring) and self._hash == other._hash and self._key == other._key

    def __lt__(self, other: Ring) -> bool:
        return self._key < other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Ring({self.ranks})"

    @property
    def _key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._ranks, self._without


class Route(NamedTuple):
    """The way of some elements: from `sender` to one rank of a ring, and on from rank to rank.

    :ivar last: the place of the rank that passes nothing on. On a CHAIN each of the others passes on once what it got;
        where LEFT and RIGHT carry half each, every other passes on two of one half, and none of the other (Sanders,
        Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast", 2009).
    """

    kind: int
    sender: int
    ring: Ring
    last: int = 0
    way: int = CHAIN

    @property
    def first(self) -> int:
        """The rank that gets the elements from the sender."""
        return self._rank(1 if self.way == CHAIN else _root(self._nodes))

    def parent(self, rank: int) -> int:
        """Return from whom a rank of the ring gets the elements."""
        node = self._node(rank)
        if self.way == CHAIN:
            return self._rank(node - 1) if node > 1 else self.sender
        if not node:
            return self._below
        above = _parent(node, self._nodes)
        return self._rank(above) if above else self.sender

    def children(self, rank: int) -> list[int]:
        """Return to whom a rank passes the elements on; the sender has one child, where they enter the ring."""
        if rank == self.sender:
            return [self.first]
        node = self._node(rank)
        if self.way == CHAIN:
            return [self._rank(node + 1)] if node < self.ring.size else []
        below = [self._rank(each) for each in _children(node, self._nodes)]
        if self.ring.size % 2 == 0 and rank == self._below:
            below.append(self.ring[self.last])
        return below

    # A node is the number, from 1 on, of a rank in the chain or in its tree. Trees have an odd number of nodes, in the
    # order of which parents are between their children: so all nodes with even numbers have two children, and the
    # others none. RIGHT is one node behind LEFT: what is even in one is odd in the other, but for one rank. In a ring
    # of an odd size that is the last; in any other the last is in neither tree, and hangs below that one.

    @property
    def _nodes(self) -> int:
        return self.ring.size - 1 + self.ring.size % 2

    @property
    def _below(self) -> int:
        return self.ring[(self.last + 1) % self.ring.size]

    def _node(self, rank: int) -> int:
        size = self.ring.size
        ahead = (self.ring.place(rank) - self.last) % size
        if self.way == CHAIN:
            return ahead or size
        if size % 2:
            return ahead + 1 if self.way == LEFT else ahead or size
        if not ahead:
            return 0
        return ahead if self.way == LEFT else ahead - 1 or size - 1

    def _rank(self, node: int) -> int:
        size = self.ring.size
        if self.way == CHAIN or (size % 2 and self.way == RIGHT):
            ahead = node
        elif size % 2:
            ahead = node - 1
        else:
            ahead = node if self.way == LEFT else node % (size - 1) + 1
        return self.ring[(self.last + ahead) % size]


def _root(nodes: int) -> int:
    return 1 << (nodes.bit_length() - 1)


def _parent(node: int, nodes: int) -> int:
    """Return the node above another, 0 for the root. Nodes that the tree lacks are skipped: theirs is below them."""
    if node == _root(nodes):
        return 0
    while True:
        step = node & -node
        node = node - step if node & (step << 1) else node + step
        if node <= nodes:
            return node


def _children(node: int, nodes: int) -> list[int]:
    step = (node & -node) >> 1
    if not step:
        return []
    left, right = node - step, step
    while node + right > nodes:
        right >>= 1
    return [left, node + right]


__all__ = ["CHAIN", "CHAINED", "CONTRIBUTION", "LEFT", "PLAIN", "RESULT", "RIGHT", "Ring", "Route"]
