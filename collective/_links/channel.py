"""A channel of the multiplexer: an outbox, an inbox, and how they end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collective._links.inbox import Inbox
from collective._links.outbox import Outbox, as_bytes
from collective._links.wire import CLOSE, DEAF, INLINE, POST, encode_message, frame_head
from collective.abc import LARGE, Channel, Message
from collective.errors import LinkBroken, LinkClosed, LinkError, PortRefused, WouldBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.mux import Mux
    from collective.abc import Buffer

ENDED, REFUSED = 0, 1
"""Codes of a CLOSE frame."""
_MOST_REASON = 1000


class MuxChannel(Channel):
    """A channel over a multiplexer.

    It is gone from the link once each end has sent its CLOSE; the inbox outlives that until it was read.
    """

    def __init__(self, mux: Mux, number: int, port: str, payload: bytes, window: int) -> None:
        self.mux = mux
        self.link = mux
        self.id = number
        self.port = port
        self.payload = payload
        self.queued = False
        """Whether the multiplexer has it in its round."""
        self.outbox = Outbox(self, window)
        self.inbox = Inbox(self, window)
        self._error: LinkError | None = None
        """Why nothing more is received."""
        self._unsendable: LinkError | None = None
        """Why nothing more is sent. The other end may have closed the channel, and have something to say before that
        comes."""
        self._close_sent = False
        self._close_received = False

    # What the consumer does.

    def send_nowait(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        if self._unsendable is not None:
            raise type(self._unsendable)(*self._unsendable.args)
        if not self.outbox.offer(header, buffers):
            raise WouldBlock(
                f"no credit on the channel to port {self.port!r}: the other end has messages to receive first; "
                "`await send(...)` waits for that"
            )

    def lend_nowait(self, header: bytes, buffers: Sequence[Buffer]) -> None:
        if self._unsendable is not None:
            raise type(self._unsendable)(*self._unsendable.args)
        if not self.outbox.offer_lent(header, buffers):
            raise WouldBlock(f"no credit on the channel to port {self.port!r}: `await send(...)` waits for it")

    async def send(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        if self._unsendable is not None:
            raise type(self._unsendable)(*self._unsendable.args)
        await self.outbox.send(header, buffers)

    def post(self, header: bytes, buffers: Sequence[Buffer] = ()) -> None:
        views = [as_bytes(buffer) for buffer in buffers]
        total = len(header) + sum(map(len, views)) + 8 * len(views)
        if total - 8 * len(views) > LARGE or total > INLINE:
            raise ValueError(f"a post of {total} bytes in {len(views)} buffers; it may have at most {LARGE}")
        if self._unsendable is None:
            self.mux.count_sent(total)
            self.mux.urge(encode_message(POST, self.id, self.inbox.take_owed(), header, views, total))

    async def receive(self) -> Message:
        return await self.inbox.receive()

    def subscribe(
        self,
        on_message: Callable[[Message], None],
        on_end: Callable[[Exception], None],
        allocate: Callable[[bytes, Sequence[int]], Sequence[memoryview] | None] | None = None,
    ) -> None:
        self.inbox.subscribe(on_message, on_end, allocate)

    def close(self) -> None:
        self.inbox.close()
        if self._error is None:
            self._finish(LinkClosed(f"the channel to port {self.port!r} was closed by this end"), ENDED, "")

    def abort(self) -> None:
        self.outbox.fail(LinkClosed(f"the channel to port {self.port!r} was cut off by this end"))
        self.close()

    # What the multiplexer does.

    @property
    def gone(self) -> bool:
        """Whether no frame about this channel may be sent any more."""
        return self._close_sent

    @property
    def deaf(self) -> bool:
        """Whether what comes for it is thrown away."""
        return self._error is not None

    def refuse(self, reason: str) -> None:
        """End a channel that the other end opened to a port that it may not have."""
        self.inbox.close()
        self._finish(PortRefused(reason), REFUSED, reason)

    def fail(self, reason: str) -> None:
        """End the channel because of what the other end sent on it."""
        self._finish(LinkBroken(f"the channel to port {self.port!r} ended: {reason}"), ENDED, reason)

    def _finish(self, error: LinkError, code: int, reason: str) -> None:
        """End the channel on our side; what waits to be sent goes first."""
        self._error = self._unsendable = error
        text = reason.encode()[:_MOST_REASON]
        self.outbox.finish(frame_head(CLOSE, self.id, count=code, body=len(text)) + text)
        self.inbox.end(error)
        self.mux.ready(self)
        if not self._close_sent:
            # It may be a while until the other end receives what goes first. Until then it must not wait for us.
            self.mux.urge(frame_head(DEAF, self.id, count=code, body=len(text)) + text)

    def deaf_received(self, code: int, reason: str) -> None:
        """The other end has closed the channel: nothing more is wanted, but something still comes."""
        error = self._ended_there(code, reason)
        self._unsendable = self._unsendable or error
        self.outbox.fail(error)
        self.mux.ready(self)  # Where this end has closed it too, its CLOSE need not wait any more.

    def close_received(self, code: int, reason: str) -> None:
        """The other end closed the channel: nothing more comes, and nothing more is wanted."""
        self._close_received = True
        error = self._ended_there(code, reason)
        self._unsendable = self._unsendable or error
        self.outbox.end(error)
        if not self._close_sent:
            self._close_sent = True
            self.mux.urge(frame_head(CLOSE, self.id))
        self._error = self._error or error
        self.mux.forget(self)
        self.inbox.end(error)

    def _ended_there(self, code: int, reason: str) -> LinkError:
        if code == REFUSED:
            return PortRefused(reason)
        why = f": {reason}" if reason else ""
        return LinkBroken(f"the channel to port {self.port!r} was closed by the other end{why}")

    def close_written(self) -> None:
        """Our CLOSE frame is on its way."""
        self._close_sent = True
        if self._close_received:
            self.mux.forget(self)

    def link_closing(self, error: LinkError) -> None:
        """This end closes the link: hand over what was sent."""
        if self._error is None:
            self._finish(error, ENDED, "")

    def link_ended(self, error: LinkError) -> None:
        """The link is no more."""
        self._close_sent = True
        self._error = self._error or error
        self._unsendable = self._unsendable or error
        self.outbox.end(error)
        self.inbox.end(error)

    def report(self, error: Exception, what: str) -> None:
        """Hand an exception of a callback, which has no caller to raise to, to the loop."""
        self.mux.loop.call_exception_handler({"message": f"channel to port {self.port!r}: {what}", "exception": error})
