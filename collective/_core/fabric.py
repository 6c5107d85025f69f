"""Messages between the members of one group, over the links of their endpoints."""

from __future__ import annotations

import asyncio
import logging
import pickle
import struct
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from collective.abc import LARGE
from collective.errors import CollectiveError, LinkClosed, OutOfResources, WouldBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.abc import Buffer, Channel, Endpoint, Link, Message
    from collective.types import Credential, Member

_ROOM = LARGE - 1024
"""Bytes of buffers that fit beside a header in one `send_nowait`."""
_PAUSE = 0.25
"""Seconds until a link is tried again for which there were no descriptors."""
_WINDOW = 128 << 20
"""Bytes of credit between two members: more than the budgets of their mailboxes, which bound what is under way."""
_RANK = struct.Struct("<I")
"""What the payload of a channel begins with: who opens it. That of a data channel goes on with its ticket, pickled."""

_log = logging.getLogger(__name__)


class _Outbox:
    """The control channel to one peer: messages wait in `queue` while the link opens or credit is short."""

    __slots__ = ("channel", "queue", "task")

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.queue: deque[tuple[bytes, Sequence[Buffer]]] = deque()
        self.task: asyncio.Task[None] | None = None


class Fabric:
    """Posts to and hears from the other members by rank; links open on first use.

    Posts to one peer arrive in order. `on_message(rank, message, buffers)`, `on_data(rank, ticket, channel)`,
    `on_lost(rank, cause)`, `on_own_end()`, when this member's own endpoint has closed, and `on_exhausted(reason)`, when
    a link could not be opened for want of descriptors, and is tried again, run on the loop.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        members: Sequence[Member],
        rank: int,
        *,
        key: str,
        credential: Credential,
    ) -> None:
        self._endpoint = endpoint
        self._members = members
        self._rank = rank
        self._port = f"group/{key}"
        self._credential = credential
        self._outboxes: dict[int, _Outbox] = {}
        self._channels: set[Channel] = set()
        self._watched: set[tuple[int, Link]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.on_message: Callable[[int, tuple[Any, ...], list[memoryview]], None]
        self.on_data: Callable[[int, Any, Channel], None]
        self.on_lost: Callable[[int, str], None]
        self.on_own_end: Callable[[], None]
        self.on_exhausted: Callable[[str], None]

    def serve(self) -> None:
        """Take what the others send from now on, what has waited included."""
        self._endpoint.serve(self._port, self._accept)

    def post(self, rank: int, message: tuple[Any, ...], buffers: Sequence[Buffer] = ()) -> None:
        """Send a message after those posted before it; never waits. Buffers may be changed when it returns."""
        if self._closed:
            return
        outbox = self._outboxes.get(rank)
        if outbox is None:
            outbox = self._outboxes[rank] = _Outbox()
        header = pickle.dumps(message, 5)
        channel = outbox.channel if len(header) + sum(map(len, buffers)) <= _ROOM else None
        if channel is not None and self._went(rank, outbox, lambda: channel.send_nowait(header, buffers)):
            return
        self._enqueue(rank, outbox, (header, [bytes(buffer) for buffer in buffers]))

    def _went(self, rank: int, outbox: _Outbox, send: Callable[[], None]) -> bool:
        """Send at once where nothing is ahead and there is room; return whether nothing is left to do."""
        if outbox.task is not None:
            return False
        try:
            send()
        except WouldBlock:
            return False
        except CollectiveError as error:
            self._lose(rank, error)
        return True

    def _enqueue(self, rank: int, outbox: _Outbox, message: tuple[bytes, Sequence[Buffer]]) -> None:
        outbox.queue.append(message)
        if outbox.task is None:
            outbox.task = self.spawn(self._drain(rank, outbox))

    def shares_memory(self, rank: int) -> bool:
        """Whether this member and a peer read each other's shared memory, as far as is known."""
        outbox = self._outboxes.get(rank)
        return outbox is not None and outbox.channel is not None and outbox.channel.link.kind == "shm"

    def lend(self, rank: int, message: tuple[Any, ...], memory: memoryview) -> None:
        """Post a message with memory that links share (`collective.links.allocate`), which is not copied."""
        if self._closed:
            return
        outbox, header = self._outboxes[rank], pickle.dumps(message, 5)
        channel = outbox.channel
        if channel is not None and self._went(rank, outbox, lambda: channel.lend_nowait(header, [memory])):
            return
        self._enqueue(rank, outbox, (header, [memory]))

    async def open_data(self, rank: int, ticket: Any) -> Channel:
        """Open a channel of its own to a peer, for a message that is too large to buffer there."""
        link = await self._link(rank)
        channel = link.open(self._port, _RANK.pack(self._rank) + pickle.dumps(ticket, 5))
        self._channels.add(channel)
        return channel

    def forget(self, channel: Channel) -> None:
        """Close a data channel."""
        self._channels.discard(channel)
        channel.close()

    def cut(self, channel: Channel) -> None:
        """Close a data channel in the middle of what it sends or receives."""
        self._channels.discard(channel)
        channel.abort()

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run a coroutine that ends with the fabric at the latest."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def connect(self, rank: int) -> None:
        """Open the link to a peer now."""
        await self._link(rank)

    async def flush(self) -> None:
        """Wait until what was posted has been handed to the links."""
        waiting = [outbox.task for outbox in self._outboxes.values() if outbox.task is not None]
        if waiting:
            await asyncio.wait(waiting)

    def close(self) -> None:
        """End every channel and task. Links stay: they are the endpoint's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._endpoint.unserve(self._port)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        for outbox in self._outboxes.values():
            if outbox.channel is not None:
                outbox.channel.close()
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    async def _link(self, rank: int) -> Link:
        link = await self._endpoint.connect(self._members[rank].address, self._credential)
        self._watch(rank, link)
        return link

    async def _link_at_last(self, rank: int) -> Link:
        """Open the link to a peer, when there are descriptors for it: what was posted to it must not be dropped."""
        while True:
            try:
                return await self._link(rank)
            except OutOfResources as error:
                self.on_exhausted(str(error))
                await asyncio.sleep(_PAUSE)

    def _watch(self, rank: int, link: Link) -> None:
        if (rank, link) not in self._watched:
            self._watched.add((rank, link))
            link.on_close(partial(self._lose, rank))

    async def _drain(self, rank: int, outbox: _Outbox) -> None:
        try:
            if outbox.channel is None:
                link = await self._link_at_last(rank)
                outbox.channel = link.open(self._port, _RANK.pack(self._rank), window=_WINDOW)
            while outbox.queue:
                header, buffers = outbox.queue.popleft()
                await outbox.channel.send(header, buffers)
        except CollectiveError as error:
            self._lose(rank, error)
        finally:
            outbox.task = None

    def _lose(self, rank: int, error: Exception) -> None:
        if self._closed:
            return
        if isinstance(error, LinkClosed):
            self.on_own_end()
        else:
            self.on_lost(rank, str(error))

    def _accept(self, channel: Channel) -> None:
        rank = self._opener(channel)
        if rank is None:
            channel.close()
            return
        self._watch(rank, channel.link)
        self._channels.add(channel)
        ticket = channel.payload[_RANK.size :]
        if ticket:
            self.on_data(rank, pickle.loads(ticket), channel)
            return

        def on_message(message: Message) -> None:
            self.on_message(rank, pickle.loads(message.header), message.buffers)

        def on_end(error: Exception) -> None:
            # A peer that closes its group says so first; a link that ends is told by the link itself.
            self._channels.discard(channel)

        channel.subscribe(on_message, on_end)

    def _opener(self, channel: Channel) -> int | None:
        """Return the rank of the member that opened a channel, or None where the link's other end is not that member.

        Before anything is unpickled: who proved a credential that opens this port may be no member of this group.
        """
        if len(channel.payload) >= _RANK.size:
            (rank,) = _RANK.unpack_from(channel.payload)
            if rank < len(self._members) and self._members[rank].address.endpoint == channel.link.remote:
                return int(rank)
        _log.warning("%s: endpoint %s opened a channel as a member that it is not", self._port, channel.link.remote)
        return None
