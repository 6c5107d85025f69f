"""The decoder, which turns the bytes of the wire into events of the multiplexer."""

from __future__ import annotations

from typing import Protocol

from collective._links.wire import (
    ADOPTED,
    BYE,
    CHUNK,
    CLOSE,
    CREDIT,
    DATA,
    DEAF,
    FORGET,
    FORGOT,
    GRANT,
    HEAD,
    INLINE,
    LEND,
    MAGIC,
    MESSAGE,
    MOST_BUFFERS,
    MOST_BYTES,
    OPEN,
    POST,
    PREFIX_FOLLOWS,
    RELEASE,
    START,
    TOTAL,
    WITHDRAW,
    Reference,
    Start,
    WireError,
    decode_references,
    decode_release,
    decode_sizes,
)

_SMALL, _SCRATCH = 8 << 10, 2 * INLINE
"""Bytes of the scratch buffer, at first and at most: there may be many links, most of them quiet."""
_OVERFLOW = 4096
"""Bytes read beyond the end of a DATA frame: the next frame's head, and what comes with it."""


class Sink(Protocol):
    """Where the bytes of a DATA frame go."""

    def target(self, limit: int) -> memoryview:
        """Return where to write next: at least one byte, at most `limit`."""
        ...

    def advance(self, count: int) -> None:
        """Take note of `count` bytes written at the last target."""
        ...


class Events(Protocol):
    """What a decoder tells. `stopped` becomes true when nothing more is wanted."""

    stopped: bool

    def on_open(self, channel: int, port: bytes, payload: bytes, window: int) -> None: ...
    def on_message(
        self, channel: int, header: bytes, buffers: list[memoryview], credit: int, *, post: bool
    ) -> None: ...
    def on_start(self, channel: int, start: Start) -> None: ...
    def on_data(self, channel: int, size: int) -> Sink: ...
    def on_credit(self, channel: int, credit: int) -> None: ...
    def on_grant(self, channel: int, serial: int, how: int) -> None: ...
    def on_withdraw(self, channel: int) -> None: ...
    def on_channel_close(self, channel: int, code: int, reason: str) -> None: ...
    def on_deaf(self, channel: int, code: int, reason: str) -> None: ...
    def on_bye(self, reason: str) -> None: ...
    def on_lend(self, channel: int, references: list[Reference]) -> None: ...
    def on_release(self, numbers: tuple[int, ...]) -> None: ...
    def on_forget(self, segment: int) -> None: ...
    def on_forgot(self, segment: int) -> None: ...
    def on_adopted(self, segment: int, mapped: bool) -> None: ...


class Decoder:
    """Turns a stream of bytes into events.

    The carrier asks `targets()` where the next bytes shall go, puts some there in order, and says how many. Bytes of
    large payloads go straight to their destination; the rest goes through a scratch buffer.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._scratch = memoryview(bytearray(_SMALL))
        self._end = 0
        self._left = 0
        self._sink: Sink | None = None
        self._room = 0

    def targets(self) -> list[memoryview]:
        """Return where to put the next bytes; not empty."""
        if self._left:
            assert self._sink is not None
            target = self._sink.target(self._left)
            self._room = len(target)
            return [target, self._scratch[:_OVERFLOW]]
        return [self._scratch[self._end :]]

    def received(self, count: int) -> None:
        """Take note of `count` bytes put at the targets, and tell what they mean.

        Raises:
            WireError: they mean nothing; the decoder cannot go on.
        """
        if self._left:
            direct = min(count, self._room)
            self._end = count - direct
            self._advance(direct)
        else:
            self._end += count
        if self._end:
            self._parse()

    def _parse(self) -> None:
        scratch, events = self._scratch, self._events
        position, end = 0, self._end
        while not events.stopped:
            if self._left:
                position = self._copy_data(position, end)
                if self._left:
                    break
                continue
            if end - position < HEAD.size:
                break
            magic, kind, flags, channel, count, head, credit, body = HEAD.unpack_from(scratch, position)
            if magic != MAGIC:
                raise WireError("what arrived is not a frame")
            if kind == DATA:
                if not 0 < body <= CHUNK:
                    raise WireError(f"a data frame of {body} bytes")
                position += HEAD.size
                self._sink = events.on_data(channel, body)
                self._left = body
                continue
            if body > INLINE:
                raise WireError(f"a frame of kind {kind} and {body} bytes")
            stop = position + HEAD.size + body
            if stop > end:
                break
            inside = scratch[position + HEAD.size : stop]
            position = stop
            if kind == MESSAGE or kind == POST:
                header, buffers = _decode_message(inside, count, head)
                events.on_message(channel, header, buffers, credit, post=kind == POST)
            elif kind == CREDIT:
                events.on_credit(channel, credit)
            else:
                self._rare(kind, flags, channel, count, head, credit, inside)
        self._keep(position, end)

    def _rare(
        self, kind: int, flags: int, channel: int, count: int, head: int, credit: int, inside: memoryview
    ) -> None:
        events = self._events
        if kind == START:
            events.on_start(channel, _decode_start(inside, flags, count, head))
        elif kind == OPEN:
            if head > len(inside):
                raise WireError("a port name longer than its frame")
            events.on_open(channel, bytes(inside[:head]), bytes(inside[head:]), credit)
        elif kind == GRANT:
            events.on_grant(channel, count, head)
        elif kind == LEND:
            events.on_lend(channel, decode_references(inside))
        elif kind == RELEASE:
            events.on_release(decode_release(inside, count))
        elif kind == FORGET:
            events.on_forget(count)
        elif kind == FORGOT:
            events.on_forgot(count)
        elif kind == ADOPTED:
            events.on_adopted(count, bool(head))
        elif kind == WITHDRAW:
            events.on_withdraw(channel)
        elif kind == CLOSE:
            events.on_channel_close(channel, count, str(inside, "utf-8", "replace"))
        elif kind == DEAF:
            events.on_deaf(channel, count, str(inside, "utf-8", "replace"))
        elif kind == BYE:
            events.on_bye(str(inside, "utf-8", "replace"))
        else:
            raise WireError(f"a frame of unknown kind {kind}")

    def _copy_data(self, position: int, end: int) -> int:
        """Move what lies in the scratch buffer of a DATA frame to where it belongs."""
        while self._left and position < end:
            assert self._sink is not None
            target = self._sink.target(min(self._left, end - position))
            size = len(target)
            target[:] = self._scratch[position : position + size]
            position += size
            self._advance(size)
        return position

    def _advance(self, count: int) -> None:
        sink = self._sink
        assert sink is not None
        self._left -= count
        if not self._left:
            self._sink = None  # It holds memory that will be the consumer's alone.
        sink.advance(count)

    def _keep(self, position: int, end: int) -> None:
        """Move what could not be parsed yet to the front; take a larger buffer where this one was filled."""
        self._end = rest = end - position
        if end == len(self._scratch) < _SCRATCH:
            larger = memoryview(bytearray(min(8 * end, _SCRATCH)))
            larger[:rest] = self._scratch[position:end]
            self._scratch = larger
        elif rest and position:
            self._scratch[:rest] = bytes(self._scratch[position:end])


def _decode_message(inside: memoryview, count: int, head: int) -> tuple[bytes, list[memoryview]]:
    if not count:
        if head != len(inside):
            raise WireError("a message's header is not as long as its frame")
        return bytes(inside), []
    at = 8 * count + head
    if at > len(inside):
        raise WireError("a message's prefix is longer than its frame")
    sizes = decode_sizes(inside[: 8 * count], len(inside) - at)
    header = bytes(inside[8 * count : at])
    buffers = []
    for size in sizes:
        buffers.append(memoryview(bytearray(inside[at : at + size])))
        at += size
    return header, buffers


def _decode_start(inside: memoryview, flags: int, count: int, head: int) -> Start:
    if len(inside) < TOTAL.size:
        raise WireError("a message's start without its length")
    (total,) = TOTAL.unpack_from(inside)
    prefix = 8 * count + head
    if not prefix <= total <= MOST_BYTES or count > MOST_BUFFERS:
        raise WireError(f"a message of {total} bytes in {count} buffers")
    if flags & PREFIX_FOLLOWS:
        if len(inside) != TOTAL.size or not prefix:
            raise WireError("a message's start is not as long as it says")
        return Start(total, head, count, None, None)
    if len(inside) != TOTAL.size + prefix:
        raise WireError("a message's start is not as long as it says")
    table = inside[TOTAL.size : TOTAL.size + 8 * count]
    return Start(total, head, count, bytes(inside[TOTAL.size + 8 * count :]), decode_sizes(table, total - prefix))
