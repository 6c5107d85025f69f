"""A consumer's end of a row stream: it gives out batches, and agrees with the others on where to end."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from collective._rows.ending import Farewell
from collective._rows.fetching import Fetcher
from collective._rows.ledger import nearest
from collective._rows.setup import LAG, Ending, Refusal, failure
from collective.errors import RowsLeftOver, StreamClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._rows.fetching import Inlet
    from collective._rows.formats import Format
    from collective._rows.ledger import Positions
    from collective._rows.setup import Seat
    from collective.abc import Channel, Message


class Delivery(NamedTuple):
    """A batch: its rows, how many of them are no padding, and where the producers are after its round."""

    rows: Any
    valid: int
    positions: Positions


class Consumer:
    """See `collective.rows.RowStream`."""

    def __init__(self, seat: Seat, number: int) -> None:
        terms = seat.terms
        self.seat = seat
        self._moved = asyncio.Event()
        pool = seat.epoch.streams.pool
        self._fetcher = Fetcher(terms, number, pool=pool, on_ready=self._moved.set, on_failure=self._abort)
        self._waiting = False
        self._given = self._done = self._floor = terms.positions
        self._done_told = terms.positions
        self._done_timer: asyncio.TimerHandle | None = None
        self._parted = False
        self._left = False
        self._over = False
        self._end: Callable[[], BaseException] | None = None
        self._farewell = Farewell(number, len(terms.consumers))
        seat.epoch.streams.enter(seat.key, self)

    # ------------------------------------------------------ what the user does

    async def next(self) -> Delivery:
        """Wait for the next batch; the one before it is done.

        Raises:
            StopAsyncIteration: the stream has ended.
        """
        if self._left:
            raise StreamClosed(self.seat.group, "iterating")
        if self._waiting:
            raise RuntimeError("a row stream is iterated by two tasks at once; have one of them pass batches on")
        self._take_done()
        self._waiting = True
        try:
            while True:
                if self.seat.fault is not None:
                    raise self.seat.fault()
                if self._end is not None:
                    raise self._end()
                delivery = self._deliver()
                if delivery is not None:
                    return delivery
                if self._end is None:
                    self._moved.clear()
                    await self._moved.wait()
        finally:
            self._waiting = False

    def leave(self, *, done: bool) -> None:
        """End the stream for all at the round to which the furthest consumer has come; `done`: with the last batch."""
        if self._left or self._parted or self.seat.fault is not None:
            self._left = True
            return
        if done:
            self._take_done()
        self._left = True
        self._begin_ending(Ending(self.seat.engine.rank))
        self._fetcher.stop()
        self._part()
        self._moved.set()

    @property
    def done(self) -> Positions:
        """What all consumers are known to have done."""
        return nearest([self._floor, self._done])

    @property
    def held(self) -> int:
        """Bytes of batches that are here or on their way."""
        return self._fetcher.held

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do at the end of the stream."""
        return self._left or self._parted or self.seat.fault is not None

    # --------------------------------------------------------------- giving out

    def _deliver(self) -> Delivery | None:
        """Return the next batch, if it is there and may be given out; else see whether the stream has ended."""
        if self._farewell.pending:
            return None
        end = self._farewell.end
        queue = self._fetcher.queue
        while queue and end is not None and not queue[0].round.within(end):
            queue.popleft()
        if queue:
            incoming = queue[0]
            if not incoming.ready:
                return None
            queue.popleft()
            self._fetcher.schedule()
            given = list(self._given)
            for producer, position in incoming.round.moves.items():
                given[producer] = max(given[producer], position)
            self._given = tuple(given)
            return Delivery(incoming.rows, incoming.round.rows, self._given)
        if self._fetcher.ledger.exhausted():
            self._end = self._last_word
            self._part()
        return None

    def _last_word(self) -> BaseException:
        """Return what ends the iteration."""
        terms = self.seat.terms
        if self._farewell.end is not None and self._farewell.why is not None and self._farewell.why.failed:
            return self._farewell.why.for_consumer(self.seat)
        if self._farewell.end is None and self._fetcher.ledger.left and terms.tail == "error":
            ledger = self._fetcher.ledger
            return RowsLeftOver(self.seat.group, ledger.left, len(terms.consumers), terms.batch_size, ledger.ends)
        return StopAsyncIteration()

    def _take_done(self) -> None:
        self._done = self._given
        if self._done != self._done_told and self._done_timer is None:
            self._done_timer = self.seat.engine.loop.call_later(LAG, self._tell_done)

    def _tell_done(self) -> None:
        self._done_timer = None
        if self._done != self._done_told:
            self._done_told = self._done
            for inlet in self._fetcher.inlets:
                inlet.tell("done", self._done)

    def _part(self) -> None:
        """This consumer has come to its end."""
        if not self._parted:
            self._parted = True
            if self._done_timer is not None:
                self._done_timer.cancel()
            for inlet in self._fetcher.inlets:
                inlet.tell("parted", self._done)

    # ----------------------------------------------------------------- hearing

    def take_channel(self, src: int, channel: Channel) -> None:
        """Take a producer's channel."""
        inlet = next((each for each in self._fetcher.inlets if each.rank == src), None)
        if inlet is None or inlet.channel is not None:
            self.seat.engine.fabric.forget(channel)
            return
        inlet.connect(channel)
        channel.subscribe(
            partial(self._hear_producer, inlet),
            partial(self._line_ended, inlet),
            None if channel.link.kind == "shm" else self._fetcher.allocate,  # there rows are read in place
        )

    def _hear_producer(self, inlet: Inlet, message: Message) -> None:
        word = inlet.hear(message.header)
        if word is None or self.seat.fault is not None:
            return
        kind, *rest = word
        if kind == "rows":
            if not self._left:
                try:
                    self._fetcher.land(inlet, rest[0], rest[1], message.buffers)
                except Exception as error:  # as above
                    self._abort(error)
            return
        if kind == "have":
            self._fetcher.ledger.announce(inlet.number, rest[0])
        elif kind == "closed":
            inlet.closed = True
            self._fetcher.ledger.announce(inlet.number, rest[0], closed=True)
        elif kind == "terms":
            self._check_terms(inlet, rest[0])
        elif kind == "format":
            self._check_format(inlet, rest[0])
        elif kind == "floor":
            self._floor = rest[0]
            return
        elif kind == "over":
            self._floor = rest[0]
            inlet.ended = True
            if all(each.ended for each in self._fetcher.inlets):
                self._finish()
            return
        elif kind == "failed":
            if not self._parted:
                self._begin_ending(rest[0])
        elif kind == "refused":
            self.refuse(rest[0])
        self._fetcher.schedule()

    def _check_terms(self, inlet: Inlet, theirs: str) -> None:
        mine = str(self.seat.terms)
        if theirs != mine:
            me = self.seat.name_of(self.seat.engine.rank)
            self.refuse(Refusal("mismatch", (self.seat.group, ((self.seat.name_of(inlet.rank), theirs), (me, mine)))))

    def _check_format(self, inlet: Inlet, form: Format) -> None:
        other = self._fetcher.take_format(inlet, form)
        if other is not None:
            said = ((self.seat.name_of(each.rank), str(each.format)[:4000]) for each in (other, inlet))
            self.refuse(Refusal("mismatch", (self.seat.group, tuple(said))))

    # ------------------------------------------------------------------ ending

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Take another consumer's word on where to end."""
        number = self.seat.terms.consumers.index(src)
        if message[0] == "bound":
            _, place, why = message
            if self._parted and not self._farewell.begun:
                self._farewell.take(number, place)  # this one has given out all rounds there are
                self.seat.epoch.streams.post(src, self.seat.key, ("over",))
                return
            self._farewell.take(number, place)
            self._begin_ending(why)
        else:
            self._farewell.take(number, None)
        self._see_the_end()

    def peer_left(self, rank: int) -> None:
        """A member closed its group: a consumer had come to the end of the stream, or its producers tell otherwise."""
        self.seat.peer_left(rank)
        if rank in self.seat.terms.consumers:
            self._farewell.take(self.seat.terms.consumers.index(rank), None)
            self._see_the_end()

    def _begin_ending(self, why: Ending) -> None:
        """Give out no more rounds before it is known to which one the furthest has come; have the others do so."""
        fresh = not self._farewell.begun
        self._farewell.begin(why, self._given)
        if fresh:
            for inlet in self._fetcher.inlets:
                inlet.tell("ended", why)
            for rank in self.seat.terms.consumers:
                if rank != self.seat.engine.rank:
                    self.seat.epoch.streams.post(rank, self.seat.key, ("bound", self._given, why))
        self._see_the_end()

    def _see_the_end(self) -> None:
        if self._farewell.end is not None:
            self._fetcher.ledger.cut(self._farewell.end)
        if not self._farewell.pending:
            self._fetcher.schedule()
            self._moved.set()

    def refuse(self, refusal: Refusal) -> None:
        """End the stream with an error for all: the producers tell the other consumers."""
        if self.seat.fault is None and not self._over:
            for inlet in self._fetcher.inlets:
                inlet.tell("refused", refusal)
            # The producers end it, each when it was told: also one whose channel is yet to come.
            self._break_off(refusal.error)
        self._leave_registry()

    def _abort(self, error: BaseException) -> None:
        """This member cannot go on: the others end where it does, and it raises the error."""
        if self.seat.fault is None and not self._left:
            self._begin_ending(failure(self.seat.engine.rank, error))
            self._part()
            self.seat.fault = lambda: error
            self._fetcher.stop()
            self._moved.set()

    def _break_off(self, fault: Callable[[], BaseException]) -> None:
        """Raise an error in every call from now on."""
        if self.seat.fault is None and not self._parted:
            self.seat.fault = fault
            self._fetcher.stop()
            self._moved.set()

    def _finish(self) -> None:
        self._over = True
        self._fetcher.stop()
        if self._done_timer is not None:
            self._done_timer.cancel()
        self.seat.epoch.streams.leave(self.seat.key)
        for inlet in self._fetcher.inlets:
            inlet.ended = True
            if inlet.channel is not None:
                self.seat.engine.fabric.forget(inlet.channel)

    def _line_ended(self, inlet: Inlet, error: Exception) -> None:
        """A producer is gone; one whose rows are all here may go."""
        if inlet.ended:
            return
        inlet.ended = True
        if self._fetcher.drained or self._parted or self.seat.fault is not None:
            self._leave_registry()  # what waits here can still be given out
        else:
            self.seat.line_ended(inlet.rank, error, self)

    def _leave_registry(self) -> None:
        """Hear no more, where no producer is left."""
        if all(inlet.ended for inlet in self._fetcher.inlets):
            self.seat.epoch.streams.leave(self.seat.key)

    def end(self) -> None:
        """The group's epoch has ended."""
        if not self._over:
            self._break_off(self.seat.group_fault)
            self._finish()

    def abandon(self, reason: str) -> None:
        """Nobody takes batches any more: the actor's call that made the stream has failed, or it was dropped."""
        self.leave(done=False)
