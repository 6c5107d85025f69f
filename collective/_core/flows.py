"""Channels between pairs of members for the bytes of one operation at a place, opened by who sends.

What else an operation needs channels for goes by (place, name).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from collective.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from collective._core.fabric import Fabric
    from collective.abc import Channel, Message


DIALS = 64
"""Links that a loop opens at a time: hundreds of members may be in it, and each has a few seconds to open one."""

_dials: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


class Sink(Protocol):
    """What takes the messages of one channel."""

    def allocate(self, header: bytes, sizes: Sequence[int]) -> Sequence[memoryview] | None:
        """Return memory for a large message that begins to come."""

    def take(self, message: Message) -> bool:
        """Take a message; return whether it was the last."""


class Flows:
    """One member's channels in one epoch. A channel that comes before its operation is issued here waits for that.

    :param tell: post a message to another rank's flows of the same epoch.
    :param spawn: run a coroutine that ends with the epoch.
    :param on_failure: called with (rank, error) where a member cannot be reached.
    """

    def __init__(
        self,
        epoch: int,
        *,
        fabric: Fabric,
        tell: Callable[[int, tuple[Any, ...], Sequence[Any]], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        on_failure: Callable[[int, Exception], None],
    ) -> None:
        self._epoch = epoch
        self._fabric = fabric
        self._tell = tell
        self.spawn = spawn
        self._on_failure = on_failure
        self._early: dict[tuple[int, Any], Channel] = {}
        self._sinks: dict[tuple[int, Any], Sink] = {}
        self._posts: dict[tuple[int, Any], list[Message]] = {}
        self._open: set[Channel] = set()
        self._ended = False

    async def open(self, dst: int, place: Any) -> Channel:
        """Open a channel to a member.

        Raises:
            CollectiveError: it cannot be reached; the group has been told. A channel that ends later means that the
                member has ended the epoch, or the link, and either is told otherwise: nobody has to tell of it.
        """
        async with _dialing():
            try:
                channel = await self._fabric.open_data(dst, (self._epoch, "flow", place))
            except CollectiveError as error:
                self._on_failure(dst, error)
                raise
        self._open.add(channel)
        return channel

    def close(self, channel: Channel) -> None:
        """Close a channel; what was sent on it is still delivered."""
        self._open.discard(channel)
        self._fabric.forget(channel)

    def post(self, dst: int, place: Any, header: bytes, data: memoryview) -> None:
        """Send a small message without a channel; never waits. The data may be changed when it returns."""
        self._tell(dst, (place, header), [data])

    def expect(self, src: int, place: Any, sink: Sink, *, posted: bool = False) -> None:
        """Give what a member sends at a place to a sink: what it posts, or what comes on a channel."""
        if posted:
            self._sinks[src, place] = sink
            for message in self._posts.pop((src, place), ()):
                self.hear(src, place, message)
            return
        channel = self._early.pop((src, place), None)
        if channel is None:
            self._sinks[src, place] = sink
        else:
            self._join(channel, sink)

    def take(self, src: int, place: Any, channel: Channel) -> None:
        """Take a channel that a member has opened."""
        if self._ended:
            self._fabric.forget(channel)
            return
        self._open.add(channel)
        sink = self._sinks.pop((src, place), None)
        if sink is None:
            self._early[src, place] = channel
        else:
            self._join(channel, sink)

    def hear(self, src: int, place: Any, message: Message) -> None:
        """Take a message that a member has posted."""
        sink = self._sinks.get((src, place))
        if sink is None:
            self._posts.setdefault((src, place), []).append(message)
        elif sink.take(message):
            del self._sinks[src, place]

    def end(self) -> None:
        """Cut off every channel: by them nothing of anybody's memory is read or written any more."""
        self._ended = True
        for channel in self._open:
            self._fabric.cut(channel)
        self._open.clear()
        self._early.clear()
        self._sinks.clear()
        self._posts.clear()

    def _join(self, channel: Channel, sink: Sink) -> None:
        def on_message(message: Message) -> None:
            if sink.take(message):
                self.close(channel)

        def on_end(error: Exception) -> None:
            self.close(channel)  # see `open`

        channel.subscribe(on_message, on_end, sink.allocate)


def _dialing() -> asyncio.Semaphore:
    return _dials.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(DIALS))
