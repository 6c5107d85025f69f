"""Who has closed the group, and how all learn of it: along the tree of announcements, over no link of its own.

So a goodbye comes behind what the tree brought before it: the verdicts of collectives and the ends of rounds that its
member had taken part in. What its member had sent beside the tree comes over other links; there it says goodbye too.

The tree must hold without those that have left. A member that has others on two sides or more goes on as their relay
after it has closed, and passes on what they tell along the tree: until all on every side but one have left as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from collective._core import tree

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from collective._core.fabric import Fabric

_ONCE: Final = {"break": 2, "doom": 2, "timeout": 2, "over": 3}
"""What else members pass on to all, and by how much of it they know that they have: an epoch breaks once, and so on."""


class Goodbye(NamedTuple):
    """What a member says that closes the group."""

    rank: int
    epoch: int
    place: int
    """It has finished its collectives up to there."""
    told: tuple[int, ...]
    """To whom it says so on its own link as well, behind what it had sent there."""


class Goodbyes:
    """One member's knowledge of who has left, and its part in spreading it.

    :param post: post a message to another rank.
    """

    def __init__(
        self, rank: int, size: int, *, loop: asyncio.AbstractEventLoop, post: Callable[[int, tuple[Any, ...]], None]
    ) -> None:
        self._rank = rank
        self._loop = loop
        self._post = post
        self._here: dict[int, int] = {}
        """By neighbour in the tree, how many are on its side that have not left."""
        for neighbour in tree.neighbours(rank, size):
            below = tree.subtree_size(rank, size) if neighbour < rank else 0
            self._here[neighbour] = size - below if below else tree.subtree_size(neighbour, size)
        self._left: set[int] = set()
        self._news: list[tuple[int, Goodbye]] = []
        """What is to be passed on, and from which neighbour it came."""

    @property
    def neighbours(self) -> list[int]:
        """Who is next to this member in the tree."""
        return list(self._here)

    @property
    def parted(self) -> bool:
        """Whether this member has others on two sides or more, which hear of each other through it alone."""
        return sum(count > 0 for count in self._here.values()) > 1

    def needs(self, rank: int) -> bool:
        """Whether the group is not what it was without that rank: it has not left, or holds the tree together."""
        return rank not in self._left or self._here.get(rank, 0) > 0

    def say(self, goodbye: Goodbye) -> None:
        """Tell this member's own, after all that it knows."""
        self._news.append((self._rank, goodbye))
        self.spread()

    def hear(self, src: int, goodbyes: Iterable[tuple[Any, ...]]) -> list[Goodbye]:
        """Take a neighbour's message; return what is new in it."""
        fresh = [goodbye for goodbye in (Goodbye(*said) for said in goodbyes) if goodbye.rank not in self._left]
        for goodbye in fresh:
            self._left.add(goodbye.rank)
            self._here[src] -= 1
            if not self._news:
                self._loop.call_soon(self.spread)  # many leave at once, as a rule: one message for all of them
            self._news.append((src, goodbye))
        return fresh

    def spread(self) -> None:
        """Pass on now what is to be passed on."""
        news, self._news = self._news, []
        for neighbour, count in self._here.items():
            goodbyes = [tuple(goodbye) for src, goodbye in news if src != neighbour]
            if goodbyes and count:
                self._post(neighbour, ("leave", goodbyes))


class Relay:
    """What stays of a member that has closed: it passes on what goes along the tree, and holds nothing of the group."""

    def __init__(self, fabric: Fabric, goodbyes: Goodbyes) -> None:
        self._fabric = fabric
        self._goodbyes = goodbyes
        self._passed: set[tuple[Any, ...]] = set()
        fabric.on_message = self._hear
        fabric.on_lost = self._lose
        fabric.on_refused = lambda rank, cause: None  # it has left too, and its goodbye is on the way
        fabric.on_own_end = fabric.end
        fabric.on_data = lambda rank, ticket, channel: fabric.forget(channel)

    def _hear(self, src: int, message: tuple[Any, ...], buffers: list[memoryview]) -> None:
        kind = message[0]
        if kind == "leave":
            self._goodbyes.hear(src, message[1])
            if not self._goodbyes.parted:
                self._end()
        elif kind == "lost":
            self._tell_of_loss(src, message)
        elif kind in _ONCE and message[: _ONCE[kind]] not in self._passed:
            self._passed.add(message[: _ONCE[kind]])
            self._pass_on(src, message)

    def _lose(self, rank: int, cause: str) -> None:
        if self._goodbyes.needs(rank):
            self._tell_of_loss(rank, ("lost", rank, cause))

    def _tell_of_loss(self, src: int, message: tuple[Any, ...]) -> None:
        # It ends the group for all: nothing needs passing on after it.
        self._pass_on(src, message)
        self._end()

    def _pass_on(self, src: int, message: tuple[Any, ...]) -> None:
        for rank in self._goodbyes.neighbours:
            if rank != src:
                self._fabric.pass_on(rank, message)

    def _end(self) -> None:
        self._goodbyes.spread()
        self._fabric.end()
