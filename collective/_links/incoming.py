"""A message that is arriving in pieces, and the memory that it goes to."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from collective._links.wire import Start, decode_sizes, message_cost
from collective.abc import LARGE, Message

if TYPE_CHECKING:
    from collective._links.inbox import Inbox


def fresh_memory(size: int) -> memoryview:
    """Return writable memory of our own.

    Large pieces are not cleared first: every byte is written before it is shown.
    """
    if size <= LARGE:
        return memoryview(bytearray(size))
    import numpy as np

    return np.empty(size, np.uint8).data


class Incoming:
    """A message that arrives in pieces. Memory for its buffers is taken when the first byte of them comes."""

    def __init__(self, inbox: Inbox, start: Start, serial: int) -> None:
        self.start = start
        self.serial = serial
        self.cost = message_cost(start.total, start.buffers)
        self.left = start.total if start.sizes is None else start.total - start.prefix
        self.start_cost = self.cost - self.left
        self.granted = False
        self.touched = False
        """Whether data has come: from then on the other end does not take it back."""
        self._inbox = inbox
        self._prefix: memoryview | None = None
        self._buffers: list[memoryview] | None = None
        self._parts: deque[memoryview] = deque()
        self._discard: memoryview | None = None

    def target(self, limit: int) -> memoryview:
        """Return where the next bytes go."""
        if self._discard is not None:
            return self._discard[:limit]
        self.touched = True
        if not self._parts:
            try:
                if self.start.sizes is None and self._prefix is None:
                    self._prefix = fresh_memory(self.start.prefix)
                    self._parts.append(self._prefix)
                else:
                    self._take_memory({})
            except MemoryError:
                self._inbox.overwhelmed(self)
                assert self._discard is not None
                return self._discard[:limit]
        return self._parts[0][:limit]

    def advance(self, count: int) -> None:
        """Take note that `count` bytes came, and hand the message over when they were the last."""
        self.left -= count
        if self._discard is not None:
            return
        part = self._parts.popleft()
        if count < len(part):
            self._parts.appendleft(part[count:])
        if not self.left:
            self._inbox.complete(self)

    def fits(self, views: dict[int, memoryview]) -> bool:
        """Whether these can be buffers of the message."""
        sizes = self.start.sizes or ()
        return all(index < len(sizes) and len(view) == sizes[index] for index, view in views.items())

    def lend(self, views: dict[int, memoryview]) -> None:
        """Take buffers that the sender lends, before any data; hand the message over when there is no more to come."""
        self.touched = True
        try:
            self._take_memory(views)
        except MemoryError:
            self._inbox.overwhelmed(self)
            return
        self.left -= sum(map(len, views.values()))
        if not self.left:
            self._inbox.complete(self)

    def _take_memory(self, lent: dict[int, memoryview]) -> None:
        header, sizes = self._described()
        self._buffers = self._inbox.memory_for(header, sizes, lent)
        self._parts.extend(buffer for index, buffer in enumerate(self._buffers) if len(buffer) and index not in lent)

    def _described(self) -> tuple[bytes, tuple[int, ...]]:
        start = self.start
        if start.sizes is not None:
            assert start.header is not None
            return start.header, start.sizes
        assert self._prefix is not None
        table = 8 * start.buffers
        sizes = decode_sizes(self._prefix[:table], start.total - start.prefix)
        header = bytes(self._prefix[table:])
        self.start = start._replace(header=header, sizes=sizes)
        return header, sizes

    def message(self) -> Message:
        """Return the message, now that all of it is there."""
        if self._buffers is None:
            self._take_memory({})
        assert self._buffers is not None
        assert self.start.header is not None
        return Message(self.start.header, self._buffers)

    def discard(self) -> None:
        """Write nothing more to the message's memory: what still comes of it goes nowhere."""
        self._discard = memoryview(bytearray(min(self.left, LARGE)))
        self._parts.clear()
