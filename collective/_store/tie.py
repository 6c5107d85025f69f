"""A store of another endpoint, over a link."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

from collective._store import wire
from collective._store.sources import Found, Source, tables
from collective._store.wire import ENTRY, HEAD
from collective.abc import Message
from collective.errors import LinkError, OutOfResources, RefLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._store.holding import Holder
    from collective._store.wire import Where
    from collective.abc import Channel

_EASE = 0.004
"""Seconds that the owner of an entry may wait to hear what nobody waits for: of several hops at once, and of a ref that
came and went only that."""
_MOST_UNSAID = 256
_PAUSE = 0.25
"""Seconds until connecting is tried again for which there were no descriptors."""


class Tie(Source):
    """A store of another endpoint. What it is told is collected for a moment, and said in one message."""

    def __init__(self, holder: Holder, where: Where, on_end: Callable[[], None]) -> None:
        super().__init__(holder, where)
        self._on_end = on_end
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Message | Found]] = {}
        self._unsaid: list[bytes] = []
        self._unsaid_holds: dict[bytes, int] = {}
        """Where among these it says that an entry is held."""
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._channel: Channel | None = None
        self._cause = ""
        self._attempt: asyncio.Future[None] = self.loop.create_future()
        """Done when connecting has been tried once more."""
        self._opening = self.loop.create_task(self._open(), name=f"connecting to the store of {where.owner}")

    async def fetch(self, entry: bytes, keys: tuple[Any, ...] | None, ref: str) -> Found:
        if self._channel is None and not self._cause:
            await asyncio.shield(self._attempt)
        if self._cause:
            raise RefLost(ref, self.where.owner, self._cause)
        number = next(self._numbers)
        reply = self._waiting[number] = self.loop.create_future()
        try:
            selected = wire.pack_keys(keys or ())
            wanted = wire.WANTED.pack(number, keys is not None, len(selected))
            self._say(ENTRY.pack(wire.FETCH, entry) + wanted + selected)
            if self._channel is not None:
                self._channel.link.linger(reply.done)
            answer = await reply
        finally:
            self._waiting.pop(number, None)
        if isinstance(answer, Found):
            return answer
        header, buffers = answer
        if not header:
            raise RefLost(ref, self.where.owner, self._cause)
        if header[0] == wire.GONE:
            raise RefLost(ref, self.where.owner, header[HEAD.size :].decode())
        return Found(buffers[0], buffers[1:])

    @property
    def lost(self) -> bool:
        return bool(self._cause)

    def lease(self, entry: bytes, seconds: float) -> None:
        self._say(ENTRY.pack(wire.LEASE, entry) + wire.SECONDS.pack(seconds))

    async def _open(self) -> None:
        while self._channel is None:
            try:
                link = await self.holder.endpoint.connect(self.where.address, self.where.credential)
                self._channel = link.open(self.where.port, self.holder.name.encode())
            except OutOfResources as error:
                attempt, self._attempt = self._attempt, self.loop.create_future()
                attempt.set_exception(error)
                attempt.exception()  # Whoever fetches raises it, if anybody does.
                await asyncio.sleep(_PAUSE)
            except LinkError as error:
                self._end(error)
                return
        self._attempt.set_result(None)
        self._channel.subscribe(self._on_message, self._end)
        link.on_close(self._end)
        self._tell()

    def _register(self, kind: int, entry: bytes, token: bytes, *, at_ease: bool) -> None:
        if kind == wire.HOLD:
            self._unsaid_holds[entry] = len(self._unsaid)
        self._collect(ENTRY.pack(kind, entry) + token, at_ease=at_ease)

    def _drop(self, entry: bytes, *, at_ease: bool) -> None:
        place = self._unsaid_holds.pop(entry, None)
        if place is None:
            self._collect(ENTRY.pack(wire.DROP, entry), at_ease=at_ease)
        else:  # It came and went: the owner has only to hear that it came.
            self._unsaid[place] = ENTRY.pack(wire.ARRIVED, entry) + self._unsaid[place][ENTRY.size :]
        if not at_ease:
            self._tell()

    def _say(self, message: bytes) -> None:
        """Tell it at once, after all that it was to be told before."""
        self._unsaid.append(message)
        self._tell()

    def _collect(self, message: bytes, *, at_ease: bool) -> None:
        self._unsaid.append(message)
        if len(self._unsaid) >= _MOST_UNSAID:
            self._tell()
        elif at_ease:
            if self._timer is None:
                self._timer = self.loop.call_later(_EASE, self._tell_in_time)
        elif not self._soon:
            self._soon = True
            # After the next turn, in which whoever the ref came to may ask for what it refers to.
            self.loop.call_soon(self.loop.call_soon, self._tell)

    def _tell_in_time(self) -> None:
        self._timer = None
        self._tell()

    def _tell(self) -> None:
        """Say all that is unsaid."""
        self._soon = False
        if self._channel is None and not self._cause:
            return
        unsaid, self._unsaid = self._unsaid, []
        self._unsaid_holds.clear()
        if self._channel is None or self._cause:
            return
        while unsaid:
            self._channel.post(b"".join(unsaid[:_MOST_UNSAID]))
            del unsaid[:_MOST_UNSAID]

    def _on_message(self, message: Message) -> None:
        kind, number = HEAD.unpack_from(message.header)
        if kind == wire.TAKEN:
            self.holder.taken(number)
            return
        answer: Message | Found | None = message
        if kind == wire.HERE and self._channel is not None and self._channel.link.kind == "memory":
            (table,) = wire.TABLE.unpack_from(message.header, HEAD.size)
            answer = tables.take(table, number)
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done() and answer is not None:
            waiting.set_result(answer)

    def _end(self, error: Exception) -> None:
        if self._cause:
            return
        self._cause = f"its owner cannot be reached any more ({error})"
        if not self._attempt.done():
            self._attempt.set_result(None)
        self._unsaid.clear()
        self._unsaid_holds.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._on_end()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(Message(b"", []))
        self.holder.lose(self)
