"""What calls say over channels.

A caller opens two channels to an actor's port `calls/<uid>`, and one more for each stream. The payload of `Link.open`
says which: `OPENING.pack(what, connection, call)`.

    MAIN    caller to actor: CALL, RESET, WAITS; posts:     actor to caller: RESULT, ERROR, CANCELLED, one for each
            CANCEL
    BULK                                                    the same, above LARGE bytes, so that they delay no small one
    STREAM  caller to actor: posts: CREDIT, STOP            actor to caller: ITEM ..., then END, ERROR or CANCELLED

Every message starts with `HEAD.pack(kind, number)`; the number is the call's (on a stream: a count of items). A pickle
follows, in the header where it is small, else as the first buffer (kind | ASIDE). Where it has refs to tensors in it,
their table and its length are at the end of the header (kind | REFS): a message without buffers is the quickest. A
CALL names its method before the pickle, and behind that its scope (kind | SCOPED, `actors._scopes`), where it has one.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from actors._pickling import Beside
from collective import freight
from collective.abc import LARGE, Message
from collective.errors import WouldBlock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.abc import Buffer, Channel, Endpoint, Link
    from collective.freight import Freight, Shipment
    from collective.store import TensorRef

OPENING: Final = struct.Struct("<BQQ")
MAIN: Final = 1
BULK: Final = 2
STREAM: Final = 3

HEAD: Final = struct.Struct("<BQ")
LENGTH: Final = struct.Struct("<I")
CALL: Final = 1
CANCEL: Final = 2
RESET: Final = 3
RESULT: Final = 4
ERROR: Final = 5
CANCELLED: Final = 6
ITEM: Final = 7
END: Final = 8
CREDIT: Final = 9
STOP: Final = 10
WAITS: Final = 11
ASIDE: Final = 0x80
REFS: Final = 0x40
SCOPED: Final = 0x20
KIND: Final = 0x1F

RESET_GROUP: Final = "a reset of a group"
TAKE_PART: Final = "a collective over references"
"""What a CALL names that is for the actor as a member of a group, and no method of its class."""

INLINE: Final = 32 << 10
"""Bytes of pickle above which it travels as a buffer: there, adding it to the header would cost a copy."""

AHEAD: Final = 16
"""Items that a stream's actor may be ahead of its reader."""


def port(uid: str) -> str:
    """Return the port at which the actor `uid` takes calls."""
    return f"calls/{uid}"


def pack(
    kind: int, number: int, data: bytes, buffers: Sequence[Buffer] = (), *, tail: bytes = b""
) -> tuple[bytes, Sequence[Buffer]]:
    """Build a message; `tail` goes between its head and the pickle `data`."""
    if len(data) <= INLINE:
        return HEAD.pack(kind, number) + tail + data, buffers
    return HEAD.pack(kind | ASIDE, number) + tail, (data, *buffers)


def load(header: bytes, refs: Sequence[TensorRef], freight: Freight) -> tuple[bytes, Shipment]:
    """Add to a header the refs that its message's pickle has in it; they are counted until it has arrived."""
    shipment = freight.ship(refs)
    table = shipment.table
    return b"".join((bytes((header[0] | REFS,)), header[1:], table, LENGTH.pack(len(table)))), shipment


def unload(message: Message, endpoint: Endpoint, link: Link | None) -> Message:
    """Take the refs of a message, as soon as it has come by a link and whether or not it will be read."""
    header, buffers = message
    if not header[0] & REFS:
        return message
    (length,) = LENGTH.unpack_from(header, len(header) - LENGTH.size)
    table = memoryview(header)[-length - LENGTH.size : -LENGTH.size]
    return Message(header, Beside(buffers, freight.unload(table, endpoint, link)))


def body(message: Message, start: int = HEAD.size) -> tuple[Buffer, Sequence[memoryview]]:
    """Take the pickle and its buffers out of a message; `start` is where the pickle is in a header that has it."""
    header, buffers = message
    if header[0] & ASIDE:
        rest = buffers[1:]
        return buffers[0], Beside(rest, buffers.refs) if type(buffers) is Beside else rest
    return memoryview(header)[start:], buffers


async def send(channel: Channel, header: bytes, buffers: Sequence[Buffer]) -> None:
    """Send a message, at once where that needs no waiting."""
    if nbytes(header, buffers) <= LARGE:
        try:
            channel.send_nowait(header, buffers)
        except WouldBlock:
            pass
        else:
            return
    await channel.send(header, buffers)


def nbytes(header: bytes, buffers: Sequence[Buffer]) -> int:
    """Return the size of a message, as compared with `collective.abc.LARGE`; each buffer's size counts as well."""
    if not buffers:
        return len(header)
    return len(header) + sum(8 + (b.nbytes if isinstance(b, memoryview) else len(b)) for b in buffers)
