"""The wire: how frames look, and the decoder that turns bytes into events of the multiplexer.

Every frame is a fixed head, then `body` bytes:

    magic u16 | kind u8 | flags u8 | channel u32 | count u32 | head u32 | credit u32 | body u64

A message is a prefix (the sizes of its `count` buffers, 8 bytes each, then its header of `head` bytes) and its
buffers. A small one is one MESSAGE or POST frame. A larger one is a START, whose body is the message's total and,
where it fits, the prefix; then DATA frames carry the rest, so that other channels' frames go in between.

What does not parse raises WireError, which ends this link and nothing else.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = struct.Struct("<HBBIIIIQ")
TOTAL = struct.Struct("<Q")
MAGIC = 0x6C67

OPEN, MESSAGE, POST, START, DATA, CREDIT, GRANT, WITHDRAW, CLOSE, BYE = range(1, 11)
PREFIX_FOLLOWS = 1
"""Flag of START: the prefix does not fit there; it is the first part of the data."""

CHUNK = 128 << 10
"""Most payload bytes of a DATA frame: what a small frame may have to wait behind."""
INLINE = 128 << 10
"""Most body bytes of any other frame."""
OVERHEAD = 64
"""Bytes that a message, and each buffer of it, cost in credit beside their contents."""
MOST_BYTES = 1 << 42
MOST_BUFFERS = 1 << 20
_SCRATCH = 2 * INLINE
_OVERFLOW = 4096

assert LARGE <= INLINE // 2

Piece: TypeAlias = "bytes | memoryview"


class Frame(NamedTuple):
    """What a carrier writes at once: pieces, one after the other, and who is to know when the last is written."""

    pieces: list[Piece]
    size: int
    owner: Written | None


class Written(Protocol):
    """Waits for a frame to be out of its hands."""

    def written(self) -> None: ...


class WireError(Exception):
    """The other end sent what this protocol does not allow."""


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
    def on_message(self, channel: int, header: bytes, buffers: list[memoryview], *, post: bool) -> None: ...
    def on_start(self, channel: int, start: Start) -> None: ...
    def on_data(self, channel: int, size: int) -> Sink: ...
    def on_credit(self, channel: int, credit: int) -> None: ...
    def on_grant(self, channel: int, serial: int) -> None: ...
    def on_withdraw(self, channel: int) -> None: ...
    def on_channel_close(self, channel: int, code: int, reason: str) -> None: ...
    def on_bye(self, reason: str) -> None: ...


class Start(NamedTuple):
    """The beginning of a message that comes in DATA frames. `header` and `sizes` are None where they follow as data."""

    total: int
    head: int
    buffers: int
    header: bytes | None
    sizes: tuple[int, ...] | None

    @property
    def prefix(self) -> int:
        """Bytes of the prefix."""
        return 8 * self.buffers + self.head


def message_cost(total: int, count: int) -> int:
    """Return what a message of `total` bytes (prefix included) in `count` buffers costs in credit."""
    return total + OVERHEAD * (1 + count)


def frame_head(kind: int, channel: int, *, count: int = 0, head: int = 0, credit: int = 0, body: int = 0) -> bytes:
    """Return the fixed part of a frame."""
    return HEAD.pack(MAGIC, kind, 0, channel, count, head, credit, body)


def encode_open(channel: int, port: str, payload: bytes, window: int) -> bytes:
    """Return an OPEN frame."""
    name = port.encode()
    body = len(name) + len(payload)
    if body > INLINE:
        raise ValueError(f"opening port {port[:64]!r}: name and payload are {body} bytes, at most {INLINE} are allowed")
    return HEAD.pack(MAGIC, OPEN, 0, channel, 0, len(name), window, body) + name + payload


def encode_message(kind: int, channel: int, credit: int, header: bytes, buffers: Sequence[Piece], total: int) -> bytes:
    """Return a MESSAGE or POST frame; `total` is the bytes of prefix and buffers together."""
    head = len(header)
    if not buffers:
        return HEAD.pack(MAGIC, kind, 0, channel, 0, head, credit, head) + header
    count = len(buffers)
    frame = HEAD.pack(MAGIC, kind, 0, channel, count, head, credit, total)
    return b"".join((frame, encode_sizes(buffers), header, *buffers))


def encode_sizes(buffers: Sequence[Piece]) -> bytes:
    """Return the table of sizes that a prefix begins with."""
    return struct.pack(f"<{len(buffers)}Q", *map(len, buffers))


def encode_start(channel: int, total: int, header: bytes, sizes: bytes) -> tuple[bytes, bytes]:
    """Return a START frame, and the prefix where it has to follow as data (else nothing)."""
    prefix = sizes + header
    count = len(sizes) // 8
    if len(prefix) + TOTAL.size <= INLINE:
        frame = HEAD.pack(MAGIC, START, 0, channel, count, len(header), 0, TOTAL.size + len(prefix))
        return frame + TOTAL.pack(total) + prefix, b""
    frame = HEAD.pack(MAGIC, START, PREFIX_FOLLOWS, channel, count, len(header), 0, TOTAL.size)
    return frame + TOTAL.pack(total), prefix


def decode_sizes(table: memoryview, expected: int) -> tuple[int, ...]:
    """Return the sizes of a message's buffers, which must add up to `expected` bytes."""
    sizes: tuple[int, ...] = struct.unpack(f"<{len(table) // 8}Q", table)
    if sum(sizes) != expected:
        raise WireError(f"buffer sizes add up to {sum(sizes)}, not {expected}")
    return sizes


class Decoder:
    """Turns a stream of bytes into events.

    The carrier asks `targets()` where the next bytes shall go, puts some there in order, and says how many. Bytes of
    large payloads go straight to their destination; the rest goes through a scratch buffer.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._start = 0
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
        position, end = self._start, self._end
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
                if credit:
                    events.on_credit(channel, credit)
                header, buffers = _decode_message(inside, count, head)
                events.on_message(channel, header, buffers, post=kind == POST)
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
            events.on_grant(channel, count)
        elif kind == WITHDRAW:
            events.on_withdraw(channel)
        elif kind == CLOSE:
            events.on_channel_close(channel, count, str(inside, "utf-8", "replace"))
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
        """Move what could not be parsed yet to the front."""
        rest = end - position
        if rest and position:
            self._scratch[:rest] = bytes(self._scratch[position:end])
        self._start, self._end = 0, rest


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
