"""Messages between the members of one group, over the links of their endpoints."""

from __future__ import annotations

import asyncio
import logging
import pickle
import struct
from collections import deque
from contextvars import Context
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

    def close(self) -> None:
        """Close the channel; what was sent on it is still delivered."""
        if self.channel is not None:
            self.channel.close()


class Fabric:
    """Posts to and hears from the other members by rank; links open on first use.

    Posts to one peer arrive in order. These run on the loop: `on_message(rank, message, buffers)`;
    `on_data(rank, ticket, channel)`; `on_lost(rank, cause)`; `on_refused(rank, cause)`, where a peer that lives takes
    nothing for this group; `on_own_end()`, when this member's own endpoint has closed; and `on_exhausted(reason)`, when
    a link could not be opened for want of descriptors, and is tried again.
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
        self._inboxes: set[Channel] = set()
        """The control channels that peers have opened."""
        self._channels: set[Channel] = set()
        """The data channels."""
        self._links: dict[int, Link] = {}
        """The latest link to each peer."""
        self._watches: dict[tuple[int, Link], Callable[[], None]] = {}
        """What ends the watch on each link."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._ended = False
        self.on_message: Callable[[int, tuple[Any, ...], list[memoryview]], None]
        self.on_data: Callable[[int, Any, Channel], None]
        self.on_lost: Callable[[int, str], None]
        self.on_refused: Callable[[int, str], None]
        self.on_own_end: Callable[[], None]
        self.on_exhausted: Callable[[str], None]

    def serve(self) -> None:
        """Take what the others send from now on, what has waited included."""
        self._endpoint.serve(self._port, self._accept)

    def post(self, rank: int, message: tuple[Any, ...], buffers: Sequence[Buffer] = ()) -> None:
        """Send a message after those posted before it; never waits. Buffers may be changed when it returns."""
        if self._closed:
            return
        self._send(rank, message, buffers)

    def pass_on(self, rank: int, message: tuple[Any, ...]) -> None:
        """Post a message that travels along the tree, also once this member has closed, until the end."""
        if not self._ended:
            self._send(rank, message, ())

    def _send(self, rank: int, message: tuple[Any, ...], buffers: Sequence[Buffer]) -> None:
        header = pickle.dumps(message, 5)
        outbox = self._outbox(rank)
        channel = outbox.channel if len(header) + sum(map(len, buffers)) <= _ROOM else None
        if channel is not None and self._went(rank, outbox, lambda: channel.send_nowait(header, buffers)):
            return
        self._enqueue(rank, outbox, (header, [bytes(buffer) for buffer in buffers]))

    def _outbox(self, rank: int) -> _Outbox:
        outbox = self._outboxes.get(rank)
        if outbox is None:
            outbox = self._outboxes[rank] = _Outbox()
            link = self._links.get(rank)
            if link is not None and not link.closed:
                outbox.channel = self._open_control(link)
        return outbox

    def _open_control(self, link: Link) -> Channel:
        return link.open(self._port, _RANK.pack(self._rank), window=_WINDOW)

    def _went(self, rank: int, outbox: _Outbox, send: Callable[[], None]) -> bool:
        """Send at once where nothing is ahead and there is room; return whether nothing is left to do."""
        if outbox.task is not None:
            return False
        try:
            send()
        except WouldBlock:
            return False
        except CollectiveError as error:
            self._fail(rank, outbox, error)
        return True

    def _enqueue(self, rank: int, outbox: _Outbox, message: tuple[bytes, Sequence[Buffer]]) -> None:
        outbox.queue.append(message)
        if outbox.task is None:
            outbox.task = asyncio.get_running_loop().create_task(self._drain(rank, outbox), context=Context())

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
        """Run a coroutine that is cancelled when the member closes, at the latest."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def connect(self, rank: int) -> None:
        """Open the link to a peer now."""
        await self._link(rank)

    @property
    def linked(self) -> set[int]:
        """The peers to which there is a link, or to which what was posted opens one."""
        return {rank for rank, link in self._links.items() if not link.closed} | self._outboxes.keys()

    async def flush(self) -> None:
        """Wait until what was posted has been handed to the links."""
        waiting = [outbox.task for outbox in self._outboxes.values() if outbox.task is not None]
        if waiting:
            await asyncio.wait(waiting)

    def close(self) -> None:
        """Cancel every task and close every data channel: the member takes part in nothing any more. Idempotent.

        What the others post is still heard, and `pass_on` works.
        """
        if self._closed:
            return
        self._closed = True
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    async def closed(self) -> None:
        """Wait for the end of the tasks that `close` has cancelled."""
        tasks = self._tasks - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks)

    def end(self, *, drop: bool = False) -> None:
        """Close, and hold nothing any more. Links stay: they are the endpoint's. Idempotent.

        :param drop: whether what was posted and is not yet handed to the links is dropped.
        """
        self.close()
        if self._ended:
            return
        self._ended = True
        self._endpoint.unserve(self._port)
        for unwatch in self._watches.values():
            unwatch()
        self._watches.clear()
        self._links.clear()
        for outbox in self._outboxes.values():
            if outbox.task is None:
                outbox.close()
            elif drop:
                outbox.task.cancel()
        for channel in self._inboxes:
            channel.close()
        self._inboxes.clear()

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
        if not self._ended and (rank, link) not in self._watches:
            self._links[rank] = link
            self._watches[rank, link] = link.on_close(partial(self._link_ended, rank, link))

    def _link_ended(self, rank: int, link: Link, error: Exception) -> None:
        self._watches.pop((rank, link), None)
        self._lose(rank, error)

    async def _drain(self, rank: int, outbox: _Outbox) -> None:
        try:
            if outbox.channel is None:
                outbox.channel = self._open_control(await self._link_at_last(rank))
            while outbox.queue:
                header, buffers = outbox.queue.popleft()
                await outbox.channel.send(header, buffers)
        except CollectiveError as error:
            outbox.queue.clear()
            self._fail(rank, outbox, error)
        finally:
            outbox.task = None
            if self._ended:
                outbox.close()

    def _fail(self, rank: int, outbox: _Outbox, error: CollectiveError) -> None:
        """Take note that nothing can be posted to a peer."""
        channel = outbox.channel
        if channel is None or channel.link.closed:
            self._lose(rank, error)
        elif not self._ended:
            self.on_refused(rank, str(error))

    def _lose(self, rank: int, error: Exception) -> None:
        if self._ended:
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
        ticket = channel.payload[_RANK.size :]
        if not ticket:
            self._hear(rank, channel)
        elif self._closed:
            channel.close()
        else:
            self._channels.add(channel)
            self.on_data(rank, pickle.loads(ticket), channel)

    def _hear(self, rank: int, channel: Channel) -> None:
        self._inboxes.add(channel)

        def on_message(message: Message) -> None:
            self.on_message(rank, pickle.loads(message.header), message.buffers)

        def on_end(error: Exception) -> None:
            # A peer that closes its group says so first; a link that ends is told by the link itself.
            self._inboxes.discard(channel)

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
