"""The row streams of one member in one epoch: which there are, and what comes for those that are yet to be made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from collective._core.warm import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective.abc import Channel

Key: TypeAlias = "tuple[str, str, int]"
"""The roles of a stream's producers and consumers, and how many streams of these roles were made before it."""


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
    """The streams of an epoch. Every member makes those of the same roles in the same order.

    :param post: post a message to another rank's streams.
    :param forget: close a channel.
    :param shared: whether links of shared memory may be about.
    """

    def __init__(
        self,
        post: Callable[[int, Key, tuple[Any, ...]], None],
        forget: Callable[[Channel], None],
        *,
        shared: bool = False,
    ) -> None:
        self._post = post
        self._forget = forget
        self.pool = Pool(WARM, shared=shared)
        self._made: dict[tuple[str, str], int] = {}
        self._ends: dict[Key, StreamEnd] = {}
        self._early: dict[Key, list[Callable[[StreamEnd], None]]] = {}

    def next_key(self, producers: str, consumers: str) -> Key:
        """Return the key of the next stream of these roles."""
        number = self._made.get((producers, consumers), 0)
        self._made[producers, consumers] = number + 1
        return producers, consumers, number

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
        return key[2] >= self._made.get(key[:2], 0)


OVER = ("over",)
"""What an end that is asked about a stream replies where it is over there."""
