"""The wire: how frames look, and the decoder that turns bytes into events of the multiplexer.

Every frame is a fixed head, then `body` bytes:

    magic u16 | kind u8 | flags u8 | channel u32 | count u32 | head u32 | credit u32 | body u64

A message is a prefix (the sizes of its `count` buffers, 8 bytes each, then its header of `head` bytes) and its
buffers. A small one is one MESSAGE or POST frame. A larger one is a START, whose body is the message's total and,
where it fits, the prefix; then DATA frames carry the rest, so that other channels' frames go in between. Where the two
ends share memory, a LEND may come before the first of these, with references to buffers that are read in place and do
not come as data; RELEASE gives such memory back by the references' numbers. ADOPTED says whether a segment of it could
be mapped: a LEND refers to those that were. FORGET ends a segment, which FORGOT confirms.

A CLOSE comes after all that its sender had to send on the channel. Where some of that has to wait, a DEAF goes ahead:
its sender has closed the channel, and throws away what comes on it.

What does not parse raises WireError, which ends this link and nothing else.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = struct.Struct("<HBBIIIIQ")
TOTAL = struct.Struct("<Q")
MAGIC = 0x6C67

REFERENCE = struct.Struct("<IIQQQ")
WAKE = b"w"
"""What goes over the socket of a link to wake the other end, which sleeps."""
SHOWN = struct.Struct("<cQQ")
"""What goes there with a segment's descriptor: SHOW, its number and its size."""
SHOW = b"s"

OPEN, MESSAGE, POST, START, DATA, CREDIT, GRANT, WITHDRAW, CLOSE, BYE, LEND, RELEASE, FORGET, FORGOT, ADOPTED, DEAF = (
    range(1, 17)
)
PREFIX_FOLLOWS = 1
"""Flag of START: the prefix does not fit there; it is the first part of the data."""

PLAIN, STANDING = 1, 2
"""What a GRANT says beside its serial: all is to come as data, into memory that the receiver gives; and of the next
messages beyond the window one may always come before it is granted."""

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
    """Waits for a frame to be out of its hands.

    :ivar copied: bytes that were copied for it beside the frame, in the same turn of the loop.
    """

    copied: int

    def written(self) -> None: ...


class WireError(Exception):
    """The other end sent what this protocol does not allow."""


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


class Reference(NamedTuple):
    """Where a buffer of a message is: in which segment of the sender, from which byte on.

    :param place: which buffer of the message it is.
    :param number: by which it is given back; unique on the link.
    """

    place: int
    segment: int
    number: int
    offset: int
    size: int


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


def decode_references(inside: memoryview) -> list[Reference]:
    """Read what a LEND frame holds."""
    if not inside or len(inside) % REFERENCE.size:
        raise WireError(f"references of {len(inside)} bytes")
    references = [Reference(*fields) for fields in REFERENCE.iter_unpack(inside)]
    if any(later.place <= earlier.place for earlier, later in pairwise(references)):
        raise WireError("references to buffers out of their order")
    return references


def encode_release(numbers: Sequence[int]) -> bytes:
    """Return a RELEASE frame."""
    body = struct.pack(f"<{len(numbers)}Q", *numbers)
    return HEAD.pack(MAGIC, RELEASE, 0, 0, len(numbers), 0, 0, len(body)) + body


def decode_release(inside: memoryview, count: int) -> tuple[int, ...]:
    """Read what a RELEASE frame holds."""
    if len(inside) != 8 * count:
        raise WireError(f"{count} numbers in {len(inside)} bytes")
    return struct.unpack(f"<{count}Q", inside)
