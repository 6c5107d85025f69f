"""The sending half of a channel: what waits to go, in order, and the credit that it has."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from pickle import PickleBuffer
from typing import TYPE_CHECKING

from collective._links.wire import (
    CHUNK,
    DATA,
    HEAD,
    INLINE,
    LEND,
    MESSAGE,
    MOST_BUFFERS,
    MOST_BYTES,
    PLAIN,
    STANDING,
    TOTAL,
    WITHDRAW,
    Frame,
    Piece,
    WireError,
    encode_message,
    encode_sizes,
    encode_start,
    frame_head,
    message_cost,
)
from collective.abc import LARGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective._links.channel import MuxChannel
    from collective._links.lending import Loan
    from collective.abc import Buffer

_MOST_PIECES = 256
"""Pieces of one frame; the kernel takes at most 1024 in one call."""


def as_bytes(buffer: Buffer) -> Piece:
    """Return a flat view of a buffer's bytes."""
    if type(buffer) is bytes:
        return buffer
    view = memoryview(buffer)
    if view.nbytes == 0:
        return b""
    if not view.c_contiguous:
        raise ValueError("a buffer that is sent must be C-contiguous")
    return view if view.ndim == 1 and view.format == "B" else PickleBuffer(view).raw()


class Outgoing:
    """A message that waits for credit, for its turn, or for the other end to ask for it.

    One of at most LARGE bytes goes out whole; one within the window goes out in pieces, as far as credit allows; one
    beyond the window announces itself and goes on, free of charge, once the other end grants it. Where that delivers by
    callback, and so grants whatever comes, one message goes ahead of its grant.
    """

    def __init__(
        self, header: bytes, buffers: Sequence[Piece], window: int, done: asyncio.Future[None] | None
    ) -> None:
        self.header = header
        self.buffers = buffers
        self.done = done
        size = sum(map(len, buffers))
        prefix = 8 * len(buffers) + len(header)
        if len(buffers) > MOST_BUFFERS or prefix + size > MOST_BYTES or len(header) >> 32:
            raise ValueError(f"a message of {len(header) + size} bytes in {len(buffers)} buffers is beyond any limit")
        self.total = prefix + size
        self.cost = message_cost(self.total, len(buffers))
        self.eager = self.cost <= window
        self.whole = self.eager and len(header) + size <= LARGE and self.total <= INLINE
        self.left = size if prefix + TOTAL.size <= INLINE else self.total
        """Bytes that DATA frames have still to carry."""
        self.start_cost = self.cost - self.left
        self.serial = 0
        """Which START of its channel announced it; 0 before."""
        self.granted = False
        self.moved = False
        """Whether a DATA frame was taken: from then on the message goes out, whatever happens."""
        self.lendable = not self.whole and prefix + TOTAL.size <= INLINE and any(len(view) > LARGE for view in buffers)
        """Whether some of it may go through memory that the other end reads in place."""
        self.loan: Loan | None = None
        self.copied = 0
        self._parts: deque[memoryview] = deque()

    def start(self, channel: int, serial: int) -> bytes:
        """Return the START frame."""
        self.serial = serial
        frame, prefix = encode_start(channel, self.total, self.header, encode_sizes(self.buffers))
        self._parts.extend(memoryview(part) for part in (prefix, *self.buffers) if len(part))
        return frame

    def lend(self, channel: int, loan: Loan) -> Frame:
        """Return a LEND frame, which takes the place of the data of what is lent."""
        lent = {index for index, *_ in loan.shares}
        self._parts = deque(memoryview(b) for at, b in enumerate(self.buffers) if len(b) and at not in lent)
        self.left -= loan.size
        self.moved = True
        self.copied = loan.copied
        body = loan.references()
        frame = frame_head(LEND, channel, count=len(lent), body=len(body)) + body
        return Frame([frame], len(frame), None if self.left else self)

    def take(self, channel: int, limit: int) -> Frame:
        """Return a DATA frame with at most `limit` of the bytes that are left."""
        pieces: list[Piece] = [b""]
        size = 0
        while self._parts and size < limit and len(pieces) < _MOST_PIECES:
            part = self._parts.popleft()
            if len(part) > limit - size:
                self._parts.appendleft(part[limit - size :])
                part = part[: limit - size]
            pieces.append(part)
            size += len(part)
        self.left -= size
        self.moved = True
        pieces[0] = head = frame_head(DATA, channel, body=size)
        return Frame(pieces, len(head) + size, None if self.left else self)

    @property
    def under_way(self) -> bool:
        """Whether somebody waits for it of which a frame may be half written."""
        return self.moved and self.done is not None and not self.done.done()

    def written(self) -> None:
        """Let the sender go on."""
        self.buffers = ()
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Tell the sender that its message was cut off."""
        self.drop_loan()
        if self.done is not None and not self.done.done():
            self.done.set_exception(error)

    def drop_loan(self) -> None:
        """Give up what it has taken of shared memory and not lent."""
        loan, self.loan = self.loan, None
        if loan is not None:
            loan.drop()

    def detach(self) -> None:
        """Copy what was not taken yet."""
        self.buffers = ()
        if self._parts:
            self._parts = deque([memoryview(b"".join(self._parts))])


class Outbox:
    """What a channel has still to send. Small messages that had credit wait encoded, others as Outgoing."""

    def __init__(self, channel: MuxChannel, window: int) -> None:
        self._channel = channel
        self._window = window
        self._credit = window
        self._queue: deque[bytes | Outgoing] = deque()
        self._waiting = 0
        self._starts = 0
        self._how = 0
        """What the last grant said beside its serial."""
        self._ahead = 0
        """The message that goes ahead of its grant."""
        self._last: Outgoing | None = None
        self._close_frame: bytes | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing waits here."""
        return not self._queue and self._close_frame is None

    def offer(self, header: bytes, buffers: Sequence[Buffer]) -> bool:
        """Write or queue a copy of a message of at most LARGE bytes, if it has credit now and none waits before it."""
        if buffers:
            views = [as_bytes(buffer) for buffer in buffers]
            size = len(header) + sum(map(len, views))
            total = size + 8 * len(views)
        else:
            views = []
            total = size = len(header)
        if size > LARGE or total > INLINE:
            raise ValueError(f"a message of {size} bytes in {len(views)} buffers; send_nowait takes at most {LARGE}")
        cost = message_cost(total, len(views))
        if self._waiting or cost > self._credit:
            return False
        self._credit -= cost
        channel = self._channel
        mux = channel.mux
        mux.count_sent(total)
        frame = encode_message(MESSAGE, channel.id, channel.inbox.take_owed(), header, views, total)
        if self._queue or not mux.write_now(frame):
            self._queue.append(frame)
            mux.ready(channel)
        return True

    def offer_lent(self, header: bytes, buffers: Sequence[Buffer]) -> bool:
        """Queue a message whose buffers nobody changes any more, if it has credit now and none waits before it."""
        message = Outgoing(header, [as_bytes(buffer) for buffer in buffers], self._window, None)
        if self._waiting or message.cost > self._credit:
            return False
        self._queue.append(message)
        self._waiting += 1
        self._channel.mux.ready(self._channel)
        return True

    async def send(self, header: bytes, buffers: Sequence[Buffer]) -> None:
        """Queue a message and wait until its buffers may be changed."""
        mux = self._channel.mux
        views = [as_bytes(buffer) for buffer in buffers]
        done = mux.loop.create_future()
        message = Outgoing(header, views, self._window, done)
        self._queue.append(message)
        self._waiting += 1
        mux.ready(self._channel)
        try:
            await done
        except asyncio.CancelledError as cancelled:
            if self._cancel(message):
                cancelled.withdrawn = True  # type: ignore[attr-defined]
            raise

    def _cancel(self, message: Outgoing) -> bool:
        """Take a message back where nothing of its contents has left; else let the rest go out from a copy.

        Return whether it was taken back.
        """
        mux = self._channel.mux
        if message.moved:
            # This may copy much on the loop. It has to: the caller may change its buffers as soon as the cancellation
            # reaches it, and the other end may already have given memory for the message.
            message.detach()
            mux.carrier.detach()
        elif message in self._queue:
            self._queue.remove(message)
            self._waiting -= 1
            message.drop_loan()
            if message.serial:
                mux.urge(frame_head(WITHDRAW, self._channel.id))
            mux.ready(self._channel)
            return True
        return False

    def add_credit(self, credit: int) -> None:
        """Take credit that the other end returned."""
        self._credit += credit
        if self._credit > self._window:
            raise WireError(f"{self._credit} bytes of credit on a channel with a window of {self._window}")

    def grant(self, serial: int, how: int) -> None:
        """Let a message beyond the window go, now that the other end asks for it."""
        self._how = how
        if serial == self._ahead:
            self._ahead = 0
        head = self._queue[0] if self._queue else None
        # Any other serial is that of a message that went ahead of its grant, or was withdrawn.
        if isinstance(head, Outgoing) and head.serial and not head.eager and not head.granted:
            self._permit(head, asked=head.serial == serial)

    def _permit(self, message: Outgoing, *, asked: bool) -> None:
        """Let a message beyond the window go if the other end asked for it, or takes whatever comes: one at a time."""
        if not asked:
            if self._ahead or not self._how & STANDING:
                return
            self._ahead = message.serial
        message.granted = True
        message.lendable &= not self._how & PLAIN

    def sendable(self) -> bool:
        """Whether `next_frame` has something."""
        if not self._queue:
            return self._close_frame is not None
        head = self._queue[0]
        if not isinstance(head, Outgoing):
            return True
        if head.whole:
            return self._credit >= head.cost
        if not head.serial:
            return not head.eager or self._credit >= head.start_cost
        if not (self._credit > 0 if head.eager else head.granted):
            return False
        return head.moved or not head.lendable or self._lend(head)

    def _lend(self, message: Outgoing) -> bool:
        """See to it that the large buffers of a message are where the other end reads them. Return whether they are.

        Where there is no such memory, or it is full, the message goes as data.
        """
        loan = message.loan
        if loan is None:
            sharing = self._channel.mux.carrier.sharing
            loan = message.loan = sharing.loan(message.buffers) if sharing is not None else None
            if loan is None:
                message.lendable = False
                return True
            loan.begin(partial(self._channel.mux.ready, self._channel))
        if loan.refused:
            message.drop_loan()
            message.lendable = False
            return True
        return loan.ready and (not message.eager or self._credit >= loan.size)

    def next_frame(self) -> Frame:
        """Return the next frame; there is one."""
        if not self._queue:
            assert self._close_frame is not None
            close, self._close_frame = self._close_frame, None
            self._channel.close_written()
            return Frame([close], len(close), None)
        head = self._queue[0]
        if not isinstance(head, Outgoing):
            return self._encoded()
        if head.whole:
            self._pop(head)
            self._credit -= head.cost
            owed = self._channel.inbox.take_owed()
            whole = encode_message(MESSAGE, self._channel.id, owed, head.header, head.buffers, head.total)
            head.written()
            return Frame([whole], len(whole), None)
        if not head.serial:
            self._starts = (self._starts % 0xFFFFFFFF) + 1
            start = head.start(self._channel.id, self._starts)
            if head.eager:
                self._credit -= head.start_cost
            else:
                self._permit(head, asked=False)
            if not head.left:
                self._pop(head)
                head.written()
            elif head.lendable and self.sendable() and head.loan is not None:  # at once, as one write and one wake-up
                pieces, size, owner = self.next_frame()
                return Frame([start, *pieces], len(start) + size, owner)
            return Frame([start], len(start), None)
        if head.loan is not None:
            loan, head.loan = head.loan, None
            frame = head.lend(self._channel.id, loan)
            size = loan.size
        else:
            frame = head.take(self._channel.id, min(CHUNK, self._credit) if head.eager else CHUNK)
            size = frame.size - HEAD.size
        if head.eager:
            self._credit -= size
        if not head.left:
            self._pop(head)
            self._last = head
        return frame

    def _encoded(self) -> Frame:
        """Return the encoded messages at the head of the queue, as many as fit into a chunk."""
        queue = self._queue
        frames: list[Piece] = []
        size = 0
        while queue and type(queue[0]) is bytes and (not frames or size + len(queue[0]) <= CHUNK):
            frame = queue.popleft()
            assert type(frame) is bytes
            frames.append(frame)
            size += len(frame)
        return Frame(frames if len(frames) == 1 else [b"".join(frames)], size, None)

    def _pop(self, message: Outgoing) -> None:
        self._queue.popleft()
        self._waiting -= 1
        self._channel.mux.count_sent(message.total)

    def finish(self, close_frame: bytes) -> None:
        """Let a CLOSE frame follow what waits."""
        self._close_frame = close_frame

    def end(self, error: Exception) -> None:
        """Send nothing more, not even a CLOSE frame."""
        self._close_frame = None
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Drop what waits, a CLOSE frame excepted, and tell who waits for it. Their memory is not read any more."""
        waiting = [item for item in self._queue if isinstance(item, Outgoing)]
        if self._last is not None:
            waiting.append(self._last)
        self._queue.clear()
        self._waiting = 0
        self._last = None
        if any(message.under_way for message in waiting):
            self._channel.mux.carrier.detach()
        for message in waiting:
            message.fail(type(error)(*error.args))
