"""The multiplexer: one carrier, many channels. Every kind of link is this, over another carrier.

Order of what is sent: control frames and posts first, in their order; then one frame of each channel that has
something to send and credit for it, round after round. A frame is cut small, so nothing waits long behind another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from collective._links.channel import MuxChannel
from collective._links.decoder import Decoder
from collective._links.wire import (
    BYE,
    CHUNK,
    Frame,
    Reference,
    WireError,
    encode_open,
    frame_head,
    message_cost,
)
from collective.abc import WINDOW, Channel, Link, Message
from collective.errors import LinkBroken, LinkClosed, LinkError
from collective.types import LinkStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._links.carrier import Carrier
    from collective._links.decoder import Sink
    from collective._links.sharing import Sharing
    from collective._links.wire import Start
    from collective.types import Credential

_CREDIT_DELAY = 0.002
"""Seconds after which credit goes home by itself, if no message has carried it."""
_CLOSE_SECONDS = 1.0
_MOST_WINDOW = 1 << 31


class _Nowhere:
    """Where the bytes of a message go that nobody wants any more."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(16 << 10))

    def target(self, limit: int) -> memoryview:
        return self._memory[:limit]

    def advance(self, count: int) -> None:
        """Forget them."""


class Mux(Link):
    """A link over a carrier whose handshake is done."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        remote: str,
        credential: Credential,
        dialed: bool,
        number: bytes,
        on_open: Callable[[Mux, MuxChannel], None],
        on_change: Callable[[Mux], None],
    ) -> None:
        self.carrier = carrier
        self.remote = remote
        self.credential = credential.name
        self.proven = credential
        """The credential itself: another endpoint may have another key by that name."""
        self.number = number
        """Identifies this link, at both ends."""
        self.loop = asyncio.get_running_loop()
        self._decoder = Decoder(self)
        self.targets = self._decoder.targets
        self.stopped = False
        self.waiting = 0
        """Channels that wait for their port to be served; the endpoint counts them."""
        self._on_open = on_open
        self._on_change = on_change
        """Called when the link begins to close, and when it has ended."""
        self._parity = 0 if dialed else 1
        self._next = 2 + self._parity
        self._last_opened = 1 - self._parity
        self._channels: dict[int, MuxChannel] = {}
        self._urgent: deque[bytes] = deque()
        self._round: deque[MuxChannel] = deque()
        self._owing: set[MuxChannel] = set()
        self._credit_timer: asyncio.TimerHandle | None = None
        self._nowhere = _Nowhere()
        self._callbacks: dict[object, Callable[[Exception], None]] = {}
        self._error: LinkError | None = None
        self._closing = False
        self._drained: asyncio.Future[None] | None = None
        self._ended = self.loop.create_future()
        self._sent = self._received = self._messages_sent = self._messages_received = 0

    def start(self) -> None:
        """Begin to move frames."""
        self.carrier.start(self)
        self.carrier.flush()

    # Link.

    @property
    def kind(self) -> str:  # type: ignore[override]  # One class serves all kinds, and a carrier may turn to another.
        return self.carrier.kind

    def linger(self, until: Callable[[], bool]) -> None:
        if self._error is None:
            self.carrier.linger(until)

    def lend(self, view: memoryview) -> tuple[int, ...] | None:
        sharing = self.carrier.sharing
        return None if sharing is None or self._error is not None else sharing.lend(view)

    def take_back(self, lent: tuple[int, ...]) -> None:
        if self._error is None:
            self._sharing().take_back(lent)

    def borrow(self, lent: tuple[int, ...]) -> memoryview | None:
        if self._error is not None:
            return None
        try:
            return self._sharing().borrow_one(Reference(*lent))
        except (WireError, TypeError) as error:
            self.end(LinkBroken(f"{self._name()} broke: it does not speak this protocol ({error})"))
            return None

    def open(self, port: str, payload: bytes = b"", *, window: int = WINDOW) -> Channel:
        if self._error is not None:
            raise type(self._error)(*self._error.args)
        if self._closing:
            raise LinkClosed(f"{self._name()} was closed by this end")
        if not 0 < window <= _MOST_WINDOW:
            raise ValueError(f"window is {window}; it is bytes, from 1 to {_MOST_WINDOW}")
        frame = encode_open(self._next, port, payload, window)
        channel = self._channels[self._next] = MuxChannel(self, self._next, port, payload, window)
        self._next += 2
        self.urge(frame)
        return channel

    def on_close(self, callback: Callable[[Exception], None]) -> Callable[[], None]:
        if self._error is not None:
            return self.loop.call_soon(callback, type(self._error)(*self._error.args)).cancel
        entry = object()
        self._callbacks[entry] = callback
        return lambda: self._forget_callback(entry)

    def _forget_callback(self, entry: object) -> None:
        self._callbacks.pop(entry, None)

    @property
    def closed(self) -> bool:
        return self._error is not None or self._closing

    async def aclose(self) -> None:
        if self._error is not None:
            return
        if self._closing:
            await asyncio.shield(self._ended)
            return
        self._closing = True
        self._on_change(self)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                for channel in list(self._channels.values()):
                    channel.link_closing(LinkClosed(f"{self._name()} was closed by this end"))
                await self._drain()
                self.urge(frame_head(BYE, 0))
                await self._drain()
                self.carrier.finish()
                # The other end closes when it has read all. Closing before that could make the kernel drop the rest.
                await asyncio.shield(self._ended)
        except TimeoutError:
            pass  # What could not be handed over in this time is dropped: that is the contract.
        finally:
            self.end(LinkClosed(f"{self._name()} was closed by this end"))

    def statistics(self) -> LinkStatistics:
        sharing = self.carrier.sharing
        return LinkStatistics(
            kind=self.kind,
            bytes_sent=self._sent,
            bytes_received=self._received,
            messages_sent=self._messages_sent,
            messages_received=self._messages_received,
            channels=len(self._channels),
            bytes_lent=sharing.bytes_lent if sharing is not None else 0,
            bytes_borrowed=sharing.bytes_borrowed if sharing is not None else 0,
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<{self._name()}, {state}, {len(self._channels)} channels>"

    def _name(self) -> str:
        return f"the {self.kind} link to endpoint {self.remote} ({self.carrier.where})"

    # How it ends.

    def carrier_ended(self, cause: str) -> None:
        """Nothing more will arrive."""
        if self._closing:
            self.end(LinkClosed(f"{self._name()} was closed by this end"))
        else:
            self.end(LinkBroken(f"{self._name()} broke: {cause}"))

    def end(self, error: LinkError) -> None:
        """End the link and all its channels at once. The first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self.stopped = True
        self.carrier.close()
        if self._credit_timer is not None:
            self._credit_timer.cancel()
        self._urgent.clear()
        self._round.clear()
        self._owing.clear()
        self._on_change(self)
        if self.loop.is_closed():
            return
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            channel.link_ended(error)
        for future in (self._drained, self._ended):
            if future is not None and not future.done():
                future.set_result(None)
        callbacks, self._callbacks = self._callbacks, {}
        for callback in callbacks.values():
            self.loop.call_soon(callback, type(error)(*error.args))

    async def _drain(self) -> None:
        """Wait until all that was sent is with the carrier's other side, or the link has ended."""
        while self._error is None and not self._nothing_to_send():
            self._drained = self.loop.create_future()
            await self._drained

    def _nothing_to_send(self) -> bool:
        return (
            not self._urgent and self.carrier.idle and all(channel.outbox.empty for channel in self._channels.values())
        )

    # What channels call.

    def ready(self, channel: MuxChannel) -> None:
        """Take a channel into the round, if it has something to send, and write."""
        if not channel.queued and channel.outbox.sendable():
            channel.queued = True
            self._round.append(channel)
            self.carrier.flush()

    def write_now(self, frame: bytes) -> bool:
        """Write a channel's frame at once, if nothing waits before it; return whether it went."""
        return not self._urgent and not self._round and self.carrier.write_now(frame)

    def urge(self, frame: bytes) -> None:
        """Write a control frame or a post before everything else."""
        if self._error is None and (self._urgent or not self.carrier.write_now(frame)):
            self._urgent.append(frame)
            self.carrier.flush()

    def forget(self, channel: MuxChannel) -> None:
        """Drop a channel that both ends have closed."""
        self._channels.pop(channel.id, None)

    def owes_credit(self, channel: MuxChannel) -> None:
        """See to it that the credit of a channel goes home soon, if no message carries it."""
        self._owing.add(channel)
        if self._credit_timer is None and self._error is None:
            self._credit_timer = self.loop.call_later(_CREDIT_DELAY, self._return_credit)

    def _return_credit(self) -> None:
        self._credit_timer = None
        owing, self._owing = self._owing, set()
        for channel in owing:
            channel.inbox.return_credit()

    def count_sent(self, size: int) -> None:
        """Count a message."""
        self._messages_sent += 1
        self._sent += size

    # What the carrier calls.

    def next_frame(self) -> Frame | None:
        if self._urgent:
            return self._next_urgent()
        while self._round:
            channel = self._round.popleft()
            if not channel.outbox.sendable():
                channel.queued = False
                continue
            frame = channel.outbox.next_frame()
            if channel.outbox.sendable():
                self._round.append(channel)
            else:
                channel.queued = False
            return frame
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        return None

    def _next_urgent(self) -> Frame:
        urgent = self._urgent
        first = urgent.popleft()
        if not urgent:
            return Frame([first], len(first), None)
        frames, size = [first], len(first)
        while urgent and size + len(urgent[0]) <= CHUNK:
            size += len(urgent[0])
            frames.append(urgent.popleft())
        return Frame([b"".join(frames)], size, None)

    def received(self, count: int) -> None:
        try:
            self._decoder.received(count)
        except WireError as error:
            self.end(LinkBroken(f"{self._name()} broke: it does not speak this protocol ({error})"))

    # What the decoder calls.

    def _find(self, number: int) -> MuxChannel | None:
        """Return a channel, or None where it has ended at this end."""
        channel = self._channels.get(number)
        if channel is None:
            known = number < self._next if number & 1 == self._parity else number <= self._last_opened
            if not known:
                raise WireError(f"a frame for channel {number}, which nobody opened")
        return channel

    def on_open(self, channel: int, port: bytes, payload: bytes, window: int) -> None:
        if channel & 1 == self._parity or channel <= self._last_opened or not 0 < window <= _MOST_WINDOW:
            raise WireError(f"channel {channel} opened out of turn, or with a window of {window}")
        try:
            name = port.decode()
        except UnicodeDecodeError as error:
            raise WireError("a port name that is not UTF-8") from error
        self._last_opened = channel
        opened = self._channels[channel] = MuxChannel(self, channel, name, payload, window)
        if self._closing:
            opened.close()
        else:
            self._on_open(self, opened)

    def on_message(self, channel: int, header: bytes, buffers: list[memoryview], credit: int, *, post: bool) -> None:
        total = len(header) + 8 * len(buffers) + sum(map(len, buffers)) if buffers else len(header)
        self._messages_received += 1
        self._received += total
        found = self._channels.get(channel) or self._find(channel)
        if found is None:
            return
        if credit:
            self._add_credit(found, credit)
        if not found.deaf:
            found.inbox.deliver(Message(header, buffers), 0 if post else message_cost(total, len(buffers)))

    def on_start(self, channel: int, start: Start) -> None:
        self._messages_received += 1
        self._received += start.total
        found = self._find(channel)
        if found is not None and not found.deaf:
            found.inbox.begin(start)

    def on_data(self, channel: int, size: int) -> Sink:
        found = self._find(channel)
        return self._nowhere if found is None or found.deaf else found.inbox.data(size)

    def on_credit(self, channel: int, credit: int) -> None:
        found = self._find(channel)
        if found is not None:
            self._add_credit(found, credit)

    def _add_credit(self, channel: MuxChannel, credit: int) -> None:
        channel.outbox.add_credit(credit)
        if not channel.outbox.empty:
            self.ready(channel)

    def on_grant(self, channel: int, serial: int, how: int) -> None:
        found = self._find(channel)
        if found is not None:
            found.outbox.grant(serial, how)
            self.ready(found)

    def on_lend(self, channel: int, references: list[Reference]) -> None:
        found = self._find(channel)
        views = self._sharing().borrow(references)
        if found is not None and not found.deaf:
            found.inbox.lend(views)
        # Otherwise they go back as they are dropped.

    def on_release(self, numbers: tuple[int, ...]) -> None:
        self._sharing().give_back(numbers)

    def on_forget(self, segment: int) -> None:
        self._sharing().forget(segment)

    def on_forgot(self, segment: int) -> None:
        self._sharing().forgot(segment)

    def on_adopted(self, segment: int, mapped: bool) -> None:
        self._sharing().adopted(segment, mapped=mapped)

    def _sharing(self) -> Sharing:
        sharing = self.carrier.sharing
        if sharing is None:
            raise WireError("shared memory on a link that has none")
        return sharing

    def on_withdraw(self, channel: int) -> None:
        found = self._find(channel)
        if found is not None and not found.deaf:
            found.inbox.withdraw()

    def on_channel_close(self, channel: int, code: int, reason: str) -> None:
        found = self._find(channel)
        if found is not None:
            found.close_received(code, reason)

    def on_deaf(self, channel: int, code: int, reason: str) -> None:
        found = self._find(channel)
        if found is not None:
            found.deaf_received(code, reason)

    def on_bye(self, reason: str) -> None:
        self.end(LinkBroken(f"{self._name()} was closed by the other end{reason and f': {reason}'}"))
