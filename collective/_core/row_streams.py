"""The row streams of one member in one epoch: which there are, and what comes for those that are yet to be made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from collective._core.warm import Pool
from collective.scopes import DEFAULT, KEPT, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.abc import Channel
    from collective.scopes import Parts

Key: TypeAlias = "tuple[str, str, bytes, int]"
"""The roles of a stream's producers and consumers, its scope, and how many such streams were made before it."""


WARM = 64 << 20
"""Bytes of memory that streams leave for those after them."""


class StreamEnd(Protocol):
    """One member's end of a stream."""

    def take_channel(self, src: int, channel: Channel) -> None:
        """Take the channel that a producer opened."""

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take a message of another consumer."""

    def peer_left(self, rank: int) -> None:
        """Take note that a member has closed the group in good order."""

    def end(self) -> None:
        """The epoch has ended."""


class Streams:
    """The streams of an epoch. Every member makes those of the same roles and scope in the same order.

    :param post: post a message to another rank's streams.
    :param forget: close a channel.
    :param parts: the actor's parts in calls.
    :param shared: whether links of shared memory may be about.
    """

    def __init__(
        self,
        post: Callable[[int, Key, tuple[Any, ...]], None],
        forget: Callable[[Channel], None],
        *,
        parts: Parts,
        shared: bool = False,
    ) -> None:
        self._post = post
        self._parts = parts
        self._forget = forget
        self.pool = Pool(WARM, shared=shared)
        self._made: dict[tuple[str, str, bytes], int] = {}
        """How many there were, for the scopes that had the last of them; a scope of a key has no end of its own."""
        self._ends: dict[Key, StreamEnd] = {}
        self._early: dict[Key, list[Callable[[StreamEnd], None]]] = {}

    def next_key(self, producers: str, consumers: str, scope: bytes) -> Key:
        """Return the key of the next stream of these roles in a scope."""
        number = self._made.pop((producers, consumers, scope), 0)
        self._made[producers, consumers, scope] = number + 1
        if len(self._made) > KEPT:
            del self._made[next(made for made in self._made if made[2] != DEFAULT.bytes)]
        return producers, consumers, scope, number

    def part_over(self, root: bytes) -> None:
        """Take note that nothing more is made in the scope of a call."""
        for made in [made for made in self._made if made[2][:ROOT] == root]:
            del self._made[made]

    def enter(self, key: Key, end: StreamEnd) -> None:
        """Deliver to an end of a stream from now on, what came early included."""
        self._ends[key] = end
        for deliver in self._early.pop(key, ()):
            deliver(end)

    def leave(self, key: Key) -> None:
        """Forget a stream that is over."""
        self._ends.pop(key, None)

    def post(self, rank: int, key: Key, message: tuple[Any, ...]) -> None:
        """Post a message to another rank's end."""
        self._post(rank, key, message)

    def take_channel(self, src: int, key: Key, channel: Channel) -> None:
        """Take a channel that another rank's end opened."""
        if key in self._ends:
            self._ends[key].take_channel(src, channel)
        elif self._is_to_come(key):
            self._early.setdefault(key, []).append(lambda end: end.take_channel(src, channel))
        else:
            self._forget(channel)

    def hear(self, src: int, key: Key, message: tuple[Any, ...]) -> None:
        """Take a message of another rank's end."""
        if key in self._ends:
            self._ends[key].hear(src, message)
        elif self._is_to_come(key):
            self._early.setdefault(key, []).append(lambda end: end.hear(src, message))
        elif message != OVER:
            self._post(src, key, OVER)

    def peer_left(self, rank: int) -> None:
        """Take note that a member has closed the group in good order."""
        for end in list(self._ends.values()):
            end.peer_left(rank)

    def end(self) -> None:
        """End all of them."""
        ends, self._ends = self._ends, {}
        self._early.clear()
        self.pool.clear()
        for end in ends.values():
            end.end()

    def _is_to_come(self, key: Key) -> bool:
        return key[3] >= self._made.get(key[:3], 0) and not self._parts.is_over(key[2][:ROOT])


OVER = ("over",)
"""What an end that is asked about a stream replies where it is over there."""
