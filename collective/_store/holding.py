"""What one endpoint holds: of its own store, and over links of others'.

A Hold is one entry that refs of this endpoint refer to. The owner counts the endpoint as a holder from the Hold's first
ref until its last is gone here, whichever thread lets go of it.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from collective._store import wire
from collective._store.wire import HEAD, NOBODY, TOKEN
from collective.abc import Message
from collective.errors import LinkError, RefLost
from collective.freight import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._store.wire import Where
    from collective.abc import Channel, Endpoint


class Found(NamedTuple):
    """What an entry consists of, or a part of it: its Spec, taken apart, and its memory."""

    spec: bytes | memoryview
    parts: Sequence[memoryview]


class Tables:
    """What is handed over within this process, since links between its endpoints copy: by table and request."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[int, Found]] = {}
        self._numbers = count(1)

    def open(self) -> tuple[int, dict[int, Found]]:
        """Return a new table and its number."""
        number = next(self._numbers)
        table = self._tables[number] = {}
        return number, table

    def close(self, number: int) -> None:
        """Forget a table."""
        del self._tables[number]

    def take(self, number: int, request: int) -> Found | None:
        """Take what was handed over; None where the table is gone."""
        return self._tables.get(number, {}).pop(request, None)


tables = Tables()


class Hold:
    """One entry that this endpoint holds."""

    __slots__ = ("__weakref__", "entry", "source")

    def __init__(self, source: Source, entry: int) -> None:
        self.source = source
        self.entry = entry


class _Watch(weakref.ref[Hold]):
    """Sees a Hold go. A finalizer of `weakref` takes ten times as long to make."""

    __slots__ = ("entry", "light")

    entry: int
    light: bool
    """Whether it is so small that the owner may learn of its end in a moment."""


class Source(ABC):
    """A store, as one endpoint that holds entries of it sees it. Belongs to the endpoint's loop."""

    def __init__(self, holder: Holder, where: Where) -> None:
        self.holder = holder
        self.where = where
        self.loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._holds: dict[int, _Watch] = {}
        self._let_go: deque[_Watch] = deque()
        self._scheduled = False

    def hold(self, entry: int, token: bytes, *, at_ease: bool = False, light: bool = False) -> Hold:
        """Hold an entry of which a ref has come; `token` is of who sent it.

        :param at_ease: its elements came along, from the owner, which may learn of the arrival in a moment.
        :param light: it is so small that the owner may learn in a moment too that it is not held any more.
        """
        watch = self._holds.get(entry)
        hold = watch() if watch is not None else None
        kind = wire.ARRIVED
        if hold is None:
            kind, hold = wire.HOLD, Hold(self, entry)
            watch = self._holds[entry] = _Watch(hold, self._see_go)
            watch.entry, watch.light = entry, light
        self._register(kind, entry, token, at_ease=at_ease)
        return hold

    @abstractmethod
    def lease(self, entry: int, seconds: float) -> None:
        """Have the owner keep an entry."""

    @property
    def lost(self) -> bool:
        """Whether the store cannot be reached any more."""
        return False

    def content(self, entry: int) -> tuple[bytes | None, Sequence[memoryview]] | None:
        """Return what the owner sends along with a ref: a Spec, taken apart (None: a tensor's), and its memory."""
        return None

    @abstractmethod
    async def fetch(self, entry: int, keys: tuple[Any, ...] | None, ref: str) -> Found:
        """Return an entry, or the part of its only tensor that `keys` select one after another, or (None) no part.

        Raises:
            RefLost: it is gone; `ref` names it.
        """

    @abstractmethod
    def _register(self, kind: int, entry: int, token: bytes, *, at_ease: bool) -> None:
        """Tell the store that a ref has come."""

    @abstractmethod
    def _drop(self, entry: int, *, at_ease: bool) -> None:
        """Tell the store that an entry is held no more."""

    def _see_go(self, watch: weakref.ref[Hold]) -> None:
        """Hold an entry no longer. In any thread, in the middle of anything."""
        assert isinstance(watch, _Watch)
        self._let_go.append(watch)
        if self._scheduled:
            return
        self._scheduled = True
        try:
            if threading.get_ident() == self._thread:
                self.loop.call_soon(self.settle)
            else:
                self.loop.call_soon_threadsafe(self.settle)
        except RuntimeError:
            self._let_go.clear()  # The loop is closed, and with it what held the entry.

    def settle(self) -> None:
        """Tell the store what was let go of."""
        self._scheduled = False
        while self._let_go:
            watch = self._let_go.popleft()
            if self._holds.get(watch.entry) is watch:
                del self._holds[watch.entry]
            self._drop(watch.entry, at_ease=watch.light)


_EASE = 0.004
"""Seconds that the owner of an entry may wait to hear what nobody waits for: of several hops at once, and of a ref that
came and went only that."""
_MOST_UNSAID = 256


class Tie(Source):
    """A store of another endpoint. What it is told is collected for a moment, and said in one message."""

    def __init__(self, holder: Holder, where: Where, on_end: Callable[[], None]) -> None:
        super().__init__(holder, where)
        self._on_end = on_end
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Message | Found]] = {}
        self._unsaid: list[bytes] = []
        self._unsaid_holds: dict[int, int] = {}
        """Where among these it says that an entry is held."""
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._channel: Channel | None = None
        self._cause = ""
        self._opening = self.loop.create_task(self._open(), name=f"connecting to the store of {where.owner}")

    async def fetch(self, entry: int, keys: tuple[Any, ...] | None, ref: str) -> Found:
        if self._cause:
            raise RefLost(ref, self.where.owner, self._cause)
        number = next(self._numbers)
        reply = self._waiting[number] = self.loop.create_future()
        try:
            data = pickle.dumps((entry, keys), pickle.HIGHEST_PROTOCOL)
            self._say(HEAD.pack(wire.FETCH, number) + wire.LENGTH.pack(len(data)) + data)
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

    def lease(self, entry: int, seconds: float) -> None:
        self._say(HEAD.pack(wire.LEASE, entry) + wire.SECONDS.pack(seconds))

    async def _open(self) -> None:
        try:
            link = await self.holder.endpoint.connect(self.where.address, self.where.credential)
        except LinkError as error:
            self._end(error)
            return
        self._channel = link.open(self.where.port, self.holder.name.encode())
        self._channel.subscribe(self._on_message, self._end)
        link.on_close(self._end)
        self._tell()

    def _register(self, kind: int, entry: int, token: bytes, *, at_ease: bool) -> None:
        if kind == wire.HOLD:
            self._unsaid_holds[entry] = len(self._unsaid)
        self._collect(HEAD.pack(kind, entry) + token, at_ease=at_ease)

    def _drop(self, entry: int, *, at_ease: bool) -> None:
        place = self._unsaid_holds.pop(entry, None)
        if place is None:
            self._collect(HEAD.pack(wire.DROP, entry), at_ease=at_ease)
        else:  # It came and went: the owner has only to hear that it came.
            self._unsaid[place] = HEAD.pack(wire.ARRIVED, entry) + self._unsaid[place][HEAD.size :]
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
        if kind == wire.HERE:
            (table,) = wire.TABLE.unpack_from(message.header, HEAD.size)
            answer = tables.take(table, number)
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done() and answer is not None:
            waiting.set_result(answer)

    def _end(self, error: Exception) -> None:
        if self._cause:
            return
        self._cause = f"its owner cannot be reached any more ({error})"
        self._unsaid.clear()
        self._unsaid_holds.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._on_end()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(Message(b"", []))
        self.holder.lose(self)


class Pin:
    """A ref on its way to another endpoint, counted here until it has arrived."""

    __slots__ = ("_on_end", "hold", "number")

    def __init__(self, hold: Hold, number: int, on_end: Callable[[Pin], None]) -> None:
        self.hold: Hold | None = hold
        self.number = number
        self._on_end = on_end

    @property
    def live(self) -> bool:
        """Whether it is counted."""
        return self.hold is not None

    def end(self) -> None:
        """Stop counting it. Idempotent."""
        hold, self.hold = self.hold, None
        if hold is not None:
            hold.source.holder.pins.pop(self.number, None)
            self._on_end(self)


class Holder:
    """All that one endpoint holds, and the refs that it has sent and that have not arrived.

    :ivar name: how owners name it to people.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.id = endpoint.address.endpoint.encode()
        self.name = name_of(endpoint)
        self.pins: dict[int, Pin] = {}
        self._sources: dict[str, Source] = {}
        self._numbers = count(1)

    def attach(self, source: Source) -> None:
        """Take the endpoint's own store."""
        self._sources[source.where.uid] = source

    def source(self, where: Where) -> Source:
        """Return a store as this endpoint sees it."""
        found = self._sources.get(where.uid)
        if found is None:
            found = self._sources[where.uid] = Tie(self, where, lambda: self._forget(where.uid))
        return found

    def pin(self, hold: Hold, on_end: Callable[[Pin], None]) -> tuple[Pin, bytes]:
        """Count a ref that is sent; return the token that goes with it."""
        number = next(self._numbers)
        pin = self.pins[number] = Pin(hold, number, on_end)
        if hold.source.lost:  # Nobody would ever tell of its arrival.
            pin.end()
        return pin, TOKEN.pack(self.id, number)

    def taken(self, number: int) -> None:
        """The receiver of a ref holds it."""
        pin = self.pins.get(number)
        if pin is not None:
            pin.end()

    def lose(self, source: Source) -> None:
        """A store is gone, and nobody will tell of its refs."""
        for pin in [pin for pin in self.pins.values() if pin.hold is not None and pin.hold.source is source]:
            pin.end()

    def _forget(self, uid: str) -> None:
        self._sources.pop(uid, None)


def holder_of(endpoint: Endpoint) -> Holder:
    """Return the Holder of an endpoint, which lives as long as that."""
    table: dict[str, Any] = endpoint.__dict__
    found = table.get("_gangline_holder")
    if found is None:
        found = table["_gangline_holder"] = Holder(endpoint)
    assert isinstance(found, Holder)
    return found


UNTOLD = TOKEN.pack(NOBODY, 0)
"""The token of a ref whose sender does not wait: one from a lease."""
