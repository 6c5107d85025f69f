"""The receiving half of a channel: messages that arrived, the one that is arriving, and the credit to return."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from collective._links.incoming import Incoming, fresh_memory
from collective._links.wire import CREDIT, GRANT, PLAIN, STANDING, WireError, frame_head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._links.channel import MuxChannel
    from collective._links.wire import Start
    from collective.abc import Message

    Allocate = Callable[[bytes, Sequence[int]], Sequence[memoryview] | None]


class Inbox:
    """What a channel has received."""

    def __init__(self, channel: MuxChannel, window: int) -> None:
        self._channel = channel
        self._window = window
        self._held = 0
        self._owed = 0
        self._messages: deque[tuple[Message, int]] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._arriving: Incoming | None = None
        self._starts = 0
        self._on_message: Callable[[Message], None] | None = None
        self._on_end: Callable[[Exception], None] | None = None
        self._allocate: Allocate | None = None
        self._draining = False
        self._error: Exception | None = None

    # What the consumer does.

    async def receive(self) -> Message:
        """Wait for the next message."""
        if self._on_message is not None:
            raise RuntimeError(f"receive() on a channel to port {self._channel.port!r} that delivers by callback")
        while not self._messages:
            if self._error is not None:
                raise type(self._error)(*self._error.args)
            waiter = self._channel.mux.loop.create_future()
            self._waiters.append(waiter)
            self._ask()
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif self._messages:
                    self._wake()  # It was this task's turn; let another one have it.
                raise
        message, cost = self._messages.popleft()
        self._consumed(cost)
        return message

    def subscribe(
        self,
        on_message: Callable[[Message], None],
        on_end: Callable[[Exception], None],
        allocate: Allocate | None,
    ) -> None:
        """Deliver by callback from now on."""
        if self._on_message is not None or self._waiters:
            raise RuntimeError(f"the channel to port {self._channel.port!r} has a receiver already")
        self._on_message, self._on_end, self._allocate = on_message, on_end, allocate
        if self._messages or self._error is not None:
            # Not from here: the subscriber may not be ready before this call returns.
            self._draining = True
            self._channel.mux.loop.call_soon(self._drain)
        self._ask()

    def _drain(self) -> None:
        while self._messages:
            self._hand_over(*self._messages.popleft())
        self._draining = False
        self._tell_end()

    def _hand_over(self, message: Message, cost: int) -> None:
        assert self._on_message is not None
        try:
            self._on_message(message)
        except Exception as error:
            self._channel.report(error, "its on_message callback failed")
        self._consumed(cost)

    def _tell_end(self) -> None:
        if self._error is None or self._on_end is None or self._draining:
            return
        on_end, self._on_message, self._on_end, self._allocate = self._on_end, _ignore, None, None
        try:
            on_end(type(self._error)(*self._error.args))
        except Exception as error:
            self._channel.report(error, "its on_end callback failed")

    # What the multiplexer does.

    def deliver(self, message: Message, cost: int) -> None:
        """Take a whole message; `cost` is the credit to return for it (a post has none)."""
        self._hold(cost)
        self._deliver(message, cost)

    def _deliver(self, message: Message, cost: int) -> None:
        if self._on_message is not None and not self._draining:
            self._hand_over(message, cost)
        else:
            self._messages.append((message, cost))
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def begin(self, start: Start) -> None:
        """Take the start of a message that comes in pieces."""
        if self._arriving is not None:
            raise WireError("a message that starts within another one")
        self._starts = (self._starts % 0xFFFFFFFF) + 1
        self._arriving = arriving = Incoming(self, start, self._starts)
        if arriving.cost <= self._window:
            arriving.granted = True
            self._hold(arriving.start_cost)
        if arriving.left:
            self._ask()
        else:
            self.complete(arriving)

    def data(self, size: int) -> Incoming:
        """Return where `size` bytes of the arriving message go."""
        arriving = self._arriving
        if arriving is None or not arriving.granted or size > arriving.left:
            raise WireError(f"{size} bytes of no message, or of one that was not asked for")
        if arriving.cost <= self._window:
            self._hold(size)
        return arriving

    def lend(self, views: dict[int, memoryview]) -> None:
        """Take those buffers of the arriving message that the sender lends, by their places in it."""
        arriving = self._arriving
        if arriving is None or not arriving.granted or arriving.touched or not arriving.fits(views):
            raise WireError("shared memory for no message, or for one that it does not fit")
        if arriving.cost <= self._window:
            self._hold(sum(map(len, views.values())))
        arriving.lend(views)

    def withdraw(self) -> None:
        """Forget the arriving message."""
        arriving, self._arriving = self._arriving, None
        if arriving is None or arriving.touched:
            raise WireError("a message was withdrawn that is not there, or is under way")
        if arriving.cost <= self._window:
            self._consumed(arriving.start_cost)

    def end(self, error: Exception) -> None:
        """Nothing more comes; who waits learns why, after what did come. The first reason stays."""
        if self._error is not None:
            return
        self._error = error
        self.drop_arriving()
        while self._waiters:
            self._wake()
        self._tell_end()

    def close(self) -> None:
        """This end closed the channel: drop what came, and call back no more."""
        self._messages.clear()
        if self._on_message is not None:
            self._on_message = _ignore
        self._on_end = self._allocate = None

    def drop_arriving(self) -> None:
        """Write nothing more to the memory of a message that is not complete."""
        if self._arriving is not None:
            self._arriving.discard()
            self._arriving = None

    def take_owed(self) -> int:
        """Return the credit that the next frame can carry home."""
        owed, self._owed = self._owed, 0
        return owed

    # Between the two.

    def _hold(self, cost: int) -> None:
        self._held += cost
        if self._held > self._window:
            raise WireError(f"{self._held} bytes came on a channel with a window of {self._window}")

    def _consumed(self, cost: int) -> None:
        if not cost:
            return
        self._held -= cost
        self._owed += cost
        if self._owed * 4 >= self._window:
            self.return_credit()
        else:
            # The next message the other way will carry it, else a timer: no credit is kept from a waiting sender.
            self._channel.mux.owes_credit(self._channel)

    def return_credit(self) -> None:
        """Send home the credit that no frame has carried."""
        if self._owed and not self._channel.gone:
            self._channel.mux.urge(frame_head(CREDIT, self._channel.id, credit=self.take_owed()))

    def _ask(self) -> None:
        """Ask for the message that is beyond the window, if there is one and somebody wants it now."""
        arriving = self._arriving
        if arriving is None or arriving.granted:
            return
        if self._on_message is not None or (self._waiters and not self._messages):
            arriving.granted = True
            how = (self._allocate is not None and PLAIN) | (self._on_message is not None and STANDING)
            self._channel.mux.urge(frame_head(GRANT, self._channel.id, count=arriving.serial, head=how))

    def complete(self, arriving: Incoming) -> None:
        """Hand over a message that came in pieces."""
        self._arriving = None
        self._deliver(arriving.message(), arriving.cost if arriving.cost <= self._window else 0)

    def overwhelmed(self, arriving: Incoming) -> None:
        """End the channel: there is no memory for a message of it."""
        self._channel.fail(f"a message of {arriving.start.total} bytes does not fit into the receiver's memory")

    def memory_for(self, header: bytes, sizes: Sequence[int], lent: dict[int, memoryview]) -> list[memoryview]:
        """Return the memory that the buffers of a message are read into; those that were lent are there already."""
        if self._allocate is not None and self._on_message is not None:
            try:
                given = self._allocate(header, sizes)
                if given is not None:
                    given = _fitting(given, sizes)
                    for index, view in lent.items():
                        given[index][:] = view
                    return given
            except Exception as error:
                self._channel.report(error, "its allocate callback failed, so that fresh memory was taken")
        return [lent[index] if index in lent else fresh_memory(size) for index, size in enumerate(sizes)]


def _fitting(given: Sequence[memoryview], sizes: Sequence[int]) -> list[memoryview]:
    views = []
    for memory in given:
        view = memoryview(memory)
        views.append(view if view.ndim == 1 and view.format == "B" else view.cast("B"))
    if [len(view) for view in views] != list(sizes) or any(view.readonly for view in views):
        raise ValueError(f"allocate gave {[len(view) for view in views]} bytes, or read-only ones, for {list(sizes)}")
    return views


def _ignore(message: Message) -> None:
    """Stand in for the callback of a channel that this end closed."""
