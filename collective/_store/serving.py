"""The owner's side: entries, who holds them, and what is sent to those who ask."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.offload import LONG, offload
from collective._store import wire
from collective._store.refs import select
from collective._store.sources import Found, Source, tables
from collective._store.trees import ALONE, Leaf, Spec
from collective._store.wire import HEAD, KEY, NOBODY, TOKEN, Malformed, Where
from collective.abc import LARGE
from collective.errors import LinkError, RefLost, WouldBlock
from collective.types import EntryStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._store.blocks import Blocks, Memory
    from collective._store.holding import Holder
    from collective.abc import Channel, Message

_MOST_UNTOLD = 4096
_MOST_NAME = 256
"""Characters by which a holder is known."""

_logger = logging.getLogger("collective")


class Entry:
    """What one `put` has put.

    :ivar number: names it to people.
    :ivar key: names it to holders, and opens it: nobody else can guess it.
    """

    def __init__(
        self, number: int, spec: Spec, memories: Sequence[Memory], parts: Sequence[memoryview]
    ) -> None:
        self.number = number
        self.key = os.urandom(KEY)
        self.spec = spec
        self.memories = tuple(memories)
        self.parts = list(parts)
        self.holders: dict[object, int] = {}
        """How often each session, and the owner itself, holds it."""
        self.leased_until = 0.0
        self.lease: asyncio.TimerHandle | None = None
        """Looks whether that time is over."""
        self.since = time.monotonic()

    @cached_property
    def data(self) -> bytes:
        """The spec, taken apart."""
        return self.spec.dumps()

    @property
    def kept(self) -> bool:
        """Whether somebody has a use for it."""
        return bool(self.holders) or self.leased_until > time.monotonic()


class Books:
    """All entries of a store. Belongs to the store's loop.

    :param blocks: the memory that entries lie in.
    :param on_free: is told of each entry that nobody has a use for any more.
    :ivar why_gone: why an entry that is asked for is not there.
    """

    def __init__(
        self, holder: Holder, where: Where, blocks: Blocks, on_free: Callable[[Entry], None]
    ) -> None:
        self.holder = holder
        self.where = where
        self.loop = asyncio.get_running_loop()
        self.entries: dict[bytes, Entry] = {}
        """By their keys. Looking for a wrong one tells nothing by its time: only equal hashes have keys compared."""
        self.why_gone = "nobody held it any more, and its owner has freed it"
        self.own = OwnSource(self)
        holder.attach(self.own)
        self._blocks = blocks
        self._on_free = on_free
        self._numbers = 0
        self._sessions: dict[bytes, list[Session]] = {}
        """By what holders say that their endpoints are: nobody knows, and telling the wrong one does no harm."""
        self._untold: dict[tuple[bytes, int], None] = {}
        _here[where.uid] = self

    def add(self, spec: Spec, memories: Sequence[Memory], parts: Sequence[memoryview]) -> Entry:
        """Make an entry of parts of blocks."""
        self._numbers += 1
        entry = Entry(self._numbers, spec, memories, parts)
        self.entries[entry.key] = entry
        return entry

    def serve(self, channel: Channel) -> None:
        """Take the channel of a holder."""
        session = Session(self, channel)
        key = channel.link.remote.encode()
        self._sessions.setdefault(key, []).append(session)
        channel.subscribe(session.on_message, lambda _: self.end(session))
        for sender, number in [untold for untold in self._untold if untold[0] == key]:
            del self._untold[sender, number]
            session.tell(number)

    def end(self, session: Session) -> None:
        """A holder is gone, or is given up. Idempotent."""
        key = session.channel.link.remote.encode()
        sessions = self._sessions.get(key, [])
        if session not in sessions:  # closed
            return
        sessions.remove(session)
        if not sessions:
            del self._sessions[key]
        session.end()
        for entry in list(self.entries.values()):
            if entry.holders.pop(session, None) is not None:
                self._look_at(entry)

    def register(self, holder: object, kind: int, key: bytes, sender: bytes, number: int) -> None:
        """Hear that a holder has got a ref, from whom, and the number of that one's pin."""
        if kind == wire.HOLD and (entry := self.entries.get(key)) is not None:
            entry.holders[holder] = entry.holders.get(holder, 0) + 1
        if sender != NOBODY:
            self._taken(sender, number)

    def drop(self, holder: object, key: bytes) -> None:
        """Hear that a holder has let go of an entry."""
        entry = self.entries.get(key)
        if entry is None:
            return
        left = entry.holders.pop(holder, 1) - 1
        if left:
            entry.holders[holder] = left
        self._look_at(entry)

    def lease(self, key: bytes, seconds: float) -> None:
        """Keep an entry, whoever holds it."""
        entry = self.entries.get(key)
        if entry is not None:
            entry.leased_until = max(entry.leased_until, time.monotonic() + seconds)
            if entry.lease is None:
                self._await_end_of_lease(entry)

    def find(self, key: bytes, keys: tuple[Any, ...] | None) -> tuple[bytes, list[memoryview] | np.ndarray] | None:
        """Return an entry's description and memory, or what `keys` select of it: an array, perhaps not in order.

        Raises:
            IndexError, ValueError: there is no such part.
        """
        entry = self.entries.get(key)
        parts = entry.parts if entry is not None else []
        if entry is None or key not in self.entries:  # freed meanwhile, where this is not the loop's thread
            return None
        if not keys:
            return entry.data, parts if keys is not None else []
        leaf = entry.spec.leaves[0]
        part = select(leaf.view(parts[leaf.part]), keys)
        return Spec(ALONE, (Leaf(0, 0, part.shape, leaf.dtype, leaf.kind),)).dumps(), part

    def take(self, key: bytes, keys: tuple[Any, ...], ref: str) -> Found:
        """Return an entry, or what `keys` select of it: in any thread of this process, also while it blocks the loop.

        Raises:
            RefLost: it is gone; `ref` names it.
        """
        found = self.find(key, keys)
        if found is not None:
            spec, parts = found
            shown = self.show(key, parts if isinstance(parts, list) else _bytes_of(np.ascontiguousarray(parts)))
            if key in self.entries:  # so that nobody writes to it while it is shown
                return Found(spec, shown)
        raise RefLost(ref, self.where.owner, self.why_gone)

    def show(self, key: bytes, parts: Sequence[memoryview]) -> list[memoryview]:
        """Return parts of an entry for readers in this process, who are seen to hold them."""
        entry = self.entries.get(key)
        # What keys select is of the one tensor, which is in the one part; of an entry that is gone, nobody will write.
        return [self._blocks.read(*pair) for pair in zip(entry.memories, parts, strict=False)] if entry else list(parts)

    def statistics(self, names: Callable[[object], str]) -> list[EntryStatistics]:
        """Describe all entries."""
        now = time.monotonic()
        return [
            EntryStatistics(
                number=entry.number,
                what=str(entry.spec.summary),
                nbytes=sum(memory.nbytes for memory in entry.memories),
                seconds=now - entry.since,
                holders=tuple(names(holder) for holder in entry.holders),
                leased=max(0.0, entry.leased_until - now),
            )
            for entry in self.entries.values()
        ]

    def close(self) -> None:
        """Forget everything."""
        self.why_gone = "its store was closed"
        sessions, self._sessions = self._sessions, {}
        for session in (session for each in sessions.values() for session in each):
            session.channel.close()
            session.end()
        for entry in list(self.entries.values()):
            self._forget(entry)
        self.holder.detach(self.own)

    def _taken(self, sender: bytes, number: int) -> None:
        """Tell the sender of a ref that its receiver holds it now."""
        if sender == self.holder.id:
            self.holder.taken(number)
        elif sessions := self._sessions.get(sender):
            for session in sessions:
                session.tell(number)
        else:
            # The receiver was quicker than the sender, which has to hold the ref as well, or is gone.
            self._untold[sender, number] = None
            if len(self._untold) > _MOST_UNTOLD:
                del self._untold[next(iter(self._untold))]

    def _look_at(self, entry: Entry) -> None:
        if not entry.kept and entry.key in self.entries:
            self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self.entries[entry.key]
        if entry.lease is not None:
            entry.lease.cancel()
        self._on_free(entry)

    def _await_end_of_lease(self, entry: Entry) -> None:
        # A moment later, lest the clocks differ.
        left = entry.leased_until - time.monotonic() + 0.01
        entry.lease = self.loop.call_later(left, self._end_lease, entry)

    def _end_lease(self, entry: Entry) -> None:
        entry.lease = None
        if entry.leased_until > time.monotonic():  # extended
            self._await_end_of_lease(entry)
        else:
            self._look_at(entry)


class OwnSource(Source):
    """A store as its own endpoint sees it: no link is between."""

    def __init__(self, books: Books) -> None:
        super().__init__(books.holder, books.where)
        self._books = books

    def find(self, entry: bytes, keys: tuple[Any, ...] | None, ref: str) -> tuple[bytes, list[memoryview] | np.ndarray]:
        """Return what `Books.find` does.

        Raises:
            RefLost: it is gone.
        """
        found = self._books.find(entry, keys)
        if found is None:
            raise RefLost(ref, self.where.owner, self._books.why_gone)
        return found

    async def fetch(self, entry: bytes, keys: tuple[Any, ...] | None, ref: str) -> Found:
        found = self.find(entry, keys, ref)
        return Found(found[0], self._books.show(entry, await _in_order(found[1])))

    def lease(self, entry: bytes, seconds: float) -> None:
        self._books.lease(entry, seconds)

    def content(self, entry: bytes) -> tuple[bytes | None, Sequence[memoryview]] | None:
        found = self._books.entries.get(entry)
        if found is None:
            return None
        if found.spec.is_plain:
            return None, found.parts
        return (found.data, found.parts) if len(found.data) <= LARGE // 16 else None

    def _register(self, kind: int, entry: bytes, token: bytes, *, at_ease: bool) -> None:
        self._books.register(self, kind, entry, *TOKEN.unpack(token))

    def _drop(self, entry: bytes, *, at_ease: bool) -> None:
        self._books.drop(self, entry)

    def __str__(self) -> str:
        return self.holder.name


class Session:
    """One holder, as the owner sees it: trusted with the entries whose keys it knows."""

    def __init__(self, books: Books, channel: Channel) -> None:
        self.channel = channel
        self._books = books
        self._name = channel.payload.decode(errors="replace")[:_MOST_NAME]
        self._sending: set[asyncio.Task[None]] = set()
        self._here = channel.link.kind == "memory"
        self._number, self._table = tables.open()

    def __str__(self) -> str:
        return self._name

    def end(self) -> None:
        """It is gone."""
        tables.close(self._number)

    def tell(self, number: int) -> None:
        """Tell it that a ref of its has arrived."""
        self.channel.post(HEAD.pack(wire.TAKEN, number))

    def on_message(self, message: Message) -> None:
        """Take what it says, one thing after the other."""
        try:
            for kind, entry, *rest in wire.parse(memoryview(message.header)):
                if kind in (wire.HOLD, wire.ARRIVED):
                    self._books.register(self, kind, entry, *rest[0])
                elif kind == wire.DROP:
                    self._books.drop(self, entry)
                elif kind == wire.LEASE:
                    self._books.lease(entry, rest[0])
                else:
                    self._fetch(entry, *rest)
        except Malformed as error:
            _logger.warning("the store of %s gives up on %s, which sent %s", self._books.where.owner, self, error)
            self.channel.close()
            self._books.end(self)

    def _fetch(self, entry: bytes, number: int, keys: tuple[Any, ...] | None) -> None:
        try:
            found = self._books.find(entry, keys)
        except (IndexError, ValueError) as error:
            raise Malformed(f"keys that select nothing: {error}") from error
        if found is None:
            self.channel.post(HEAD.pack(wire.GONE, number) + self._books.why_gone.encode())
            return
        spec, parts = found
        if self._here and isinstance(parts, list):
            self._hand_over(number, entry, spec, parts)
            return
        if isinstance(parts, list) and len(spec) + sum(part.nbytes + 8 for part in parts) <= LARGE // 2:
            try:
                self.channel.send_nowait(HEAD.pack(wire.REPLY, number), [spec, *parts])
                return
            except WouldBlock:
                pass
            except LinkError:
                return  # it is gone, and knows
        task = self._books.loop.create_task(self._send(number, entry, spec, parts), name=f"sending to {self}")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _hand_over(self, number: int, entry: bytes, spec: bytes, parts: list[memoryview]) -> None:
        self._table[number] = Found(spec, self._books.show(entry, parts))
        self.channel.post(HEAD.pack(wire.HERE, number) + wire.TABLE.pack(self._number))

    async def _send(self, number: int, entry: bytes, spec: bytes, parts: list[memoryview] | np.ndarray) -> None:
        parts = await _in_order(parts)
        if self._here:
            self._hand_over(number, entry, spec, parts)
            return
        try:
            await self.channel.send(HEAD.pack(wire.REPLY, number), [spec, *parts])
        except LinkError:
            return  # it is gone, and knows


async def _in_order(parts: list[memoryview] | np.ndarray) -> list[memoryview]:
    """Return memory as it is, or that of an array's elements, copied where they do not lie in order."""
    if isinstance(parts, list):
        return parts
    array = parts
    if not array.flags.c_contiguous:
        array = await offload(array.copy) if array.nbytes > LONG else array.copy()
    return _bytes_of(array)


def _bytes_of(array: np.ndarray) -> list[memoryview]:
    return [array.reshape(-1).view(np.uint8).data]


def books_here(uid: str) -> Books | None:
    """Return the books of a store in this process; None: it is in another."""
    return _here.get(uid)


_here: weakref.WeakValueDictionary[str, Books] = weakref.WeakValueDictionary()
