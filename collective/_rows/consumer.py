"""A consumer's end of a row stream: it reckons which rows are its own, fetches them and gives them out in batches."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from collective._core.offload import LONG, offload
from collective._rows.ending import Farewell
from collective._rows.ledger import Ledger, nearest
from collective._rows.setup import LAG, LITTLE, Ending, Line, Refusal, failure
from collective.errors import RowsLeftOver, StreamClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._rows.formats import Format, Landing
    from collective._rows.ledger import Positions, Round
    from collective._rows.order import Run
    from collective._rows.setup import Seat
    from collective.abc import Channel, Message

_SPANS = 1000
"""Pieces that one word asks for."""


class Delivery(NamedTuple):
    """A batch: its rows, how many of them are no padding, and where the producers are after its round."""

    rows: Any
    valid: int
    positions: Positions


class _Inlet(Line):
    """One producer, as a consumer sees it."""

    def __init__(self, rank: int, number: int) -> None:
        super().__init__()
        self.rank = rank
        self.number = number
        self.format: Format | None = None
        self.closed = False
        self.coming: deque[tuple[_Incoming, list[Run]]] = deque()
        """What was asked for, in that order, in which it comes."""


class _Incoming:
    """A batch on its way."""

    __slots__ = ("landing", "missing", "pulled", "ready", "round", "rows")

    def __init__(self, step: Round, landing: Landing) -> None:
        self.round = step
        self.landing = landing
        self.missing = 0
        self.pulled = False
        self.ready = False
        self.rows: Any = None


class Consumer:
    """See `collective.rows.RowStream`."""

    def __init__(self, seat: Seat, number: int) -> None:
        terms = seat.terms
        self.seat = seat
        self._inlets = {rank: _Inlet(rank, n) for n, rank in enumerate(terms.producers)}
        self._ledger = Ledger(
            terms.positions,
            terms.origins,
            consumers=len(terms.consumers),
            batch=terms.batch_size,
            me=number,
            order=terms.order,
            tail=terms.tail,
        )
        self._format: Format | None = None
        self._loading = False
        self._queue: deque[_Incoming] = deque()
        self._moved = asyncio.Event()
        self._waiting = False
        self._given = self._done = self._floor = terms.positions
        self._done_told = terms.positions
        self._done_timer: asyncio.TimerHandle | None = None
        self._pump_soon = False
        self._drained = False
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
        self._queue.clear()
        self._part()
        self._moved.set()

    @property
    def done(self) -> Positions:
        """What all consumers are known to have done."""
        return nearest([self._floor, self._done])

    @property
    def held(self) -> int:
        """Bytes of batches that are here or on their way."""
        return 0 if self._format is None else len(self._queue) * self._batch_bytes

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
        while self._queue and end is not None and not self._queue[0].round.within(end):
            self._queue.popleft()
        if self._queue:
            incoming = self._queue[0]
            if not incoming.ready:
                return None
            self._queue.popleft()
            self._schedule_pump()
            given = list(self._given)
            for producer, position in incoming.round.moves.items():
                given[producer] = max(given[producer], position)
            self._given = tuple(given)
            return Delivery(incoming.rows, incoming.round.rows, self._given)
        if self._ledger.exhausted():
            self._end = self._last_word
            self._part()
        return None

    def _last_word(self) -> BaseException:
        """Return what ends the iteration."""
        terms = self.seat.terms
        if self._farewell.end is not None and self._farewell.why is not None and self._farewell.why.failed:
            return self._farewell.why.for_consumer(self.seat)
        if self._farewell.end is None and self._ledger.left and terms.tail == "error":
            return RowsLeftOver(
                self.seat.group, self._ledger.left, len(terms.consumers), terms.batch_size, self._ledger.ends
            )
        return StopAsyncIteration()

    def _take_done(self) -> None:
        self._done = self._given
        if self._done != self._done_told and self._done_timer is None:
            self._done_timer = self.seat.engine.loop.call_later(LAG, self._tell_done)

    def _tell_done(self) -> None:
        self._done_timer = None
        if self._done != self._done_told:
            self._done_told = self._done
            for inlet in self._inlets.values():
                inlet.tell("done", self._done)

    def _part(self) -> None:
        """This consumer has come to its end."""
        if not self._parted:
            self._parted = True
            if self._done_timer is not None:
                self._done_timer.cancel()
            for inlet in self._inlets.values():
                inlet.tell("parted", self._done)

    # ---------------------------------------------------------------- fetching

    @property
    def _batch_bytes(self) -> int:
        assert self._format is not None
        return max(1, self._format.row_bytes * self.seat.terms.batch_size)

    def _schedule_pump(self) -> None:
        if not self._pump_soon:
            self._pump_soon = True
            self.seat.engine.loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Plan the rounds that are announced and that the budget admits, and ask for their rows."""
        self._pump_soon = False
        if self._over or self._left or self.seat.fault is not None:
            return
        try:
            self._plan()
        except Exception as error:  # no memory, say: nobody awaits this, and the next batch must not be waited for
            self._abort(error)
            return
        if self._ledger.exhausted():
            self._moved.set()
            if not self._drained and all(not inlet.coming for inlet in self._inlets.values()):
                self._drained = True
                for inlet in self._inlets.values():
                    inlet.tell("drained")

    def _plan(self) -> None:
        if self._may_plan() and self._format is not None:
            most = max(1, self.seat.terms.budget // self._batch_bytes)
            while len(self._queue) < most and (step := self._ledger.next_round()) is not None:
                self._queue.append(_Incoming(step, self._format.landing(self.seat.terms.batch_size, step.rows)))
            self._pull()

    def _may_plan(self) -> bool:
        """Whether every producer's columns are known, and the library that holds them is there."""
        if any(inlet.format is None and not inlet.closed for inlet in self._inlets.values()):
            return False
        if self._format is None or self._format.loaded:
            return True
        if not self._loading:
            self._loading = True
            offload(self._format.load).add_done_callback(self._loaded)
        return False

    def _loaded(self, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if error is None:
            self._pump()
        else:
            self._abort(error)

    def _pull(self) -> None:
        fresh = [incoming for incoming in self._queue if not incoming.pulled]
        if not fresh:
            return
        on_the_way = any(inlet.coming for inlet in self._inlets.values())
        if on_the_way and len(fresh) * self._batch_bytes < LITTLE:
            return  # more may be asked for at once when that has come
        spans: dict[int, list[tuple[int, int]]] = {inlet.number: [] for inlet in self._inlets.values()}
        inlets = list(self._inlets.values())
        for incoming in fresh:
            incoming.pulled = True
            runs: dict[int, list[Run]] = {}
            for run in incoming.round.runs:
                runs.setdefault(run.producer, []).append(run)
            for number, span in incoming.round.wanted().items():
                incoming.missing += 1
                spans[number].append(span)
                inlets[number].coming.append((incoming, runs[number]))
            if not incoming.missing:
                self._complete(incoming)
        for number, wanted in spans.items():
            for at in range(0, len(wanted), _SPANS):
                inlets[number].tell("pull", wanted[at : at + _SPANS])

    def _land(self, inlet: _Inlet, joined: bool, pieces: list[list[int]], buffers: list[memoryview]) -> None:
        """Put rows that have come where they belong."""
        assert self._format is not None
        if joined:
            buffers = self._format.split(list(itertools.chain.from_iterable(pieces)), buffers[0])
        jobs: list[tuple[Landing, list[Run], list[int], list[memoryview]]] = []
        landed: list[_Incoming] = []
        at = 0
        for parts in pieces:
            incoming, runs = inlet.coming.popleft()
            used = len(parts) * self._format.buffers
            jobs.append((incoming.landing, runs, parts, buffers[at : at + used]))
            landed.append(incoming)
            at += used

        def place() -> None:
            for job in jobs:
                _place(*job)

        if sum(map(len, buffers)) > LONG:
            offload(place).add_done_callback(partial(self._placed, landed))
        else:
            place()
            self._count(landed)

    def _placed(self, landed: list[_Incoming], done: asyncio.Future[None]) -> None:
        error = done.exception()
        if error is None:
            self._count(landed)
        else:
            self._abort(error)

    def _count(self, landed: list[_Incoming]) -> None:
        for incoming in landed:
            incoming.missing -= 1
            if not incoming.missing:
                self._complete(incoming)
        self._schedule_pump()

    def _complete(self, incoming: _Incoming) -> None:
        """Make a batch of what has landed."""
        assert self._format is not None
        if self._format.exact:
            self._completed(incoming, incoming.landing.finish())
            return

        def finished(done: asyncio.Future[Any]) -> None:
            error = done.exception()
            if error is None:
                self._completed(incoming, done.result())
            else:
                self._abort(error)

        offload(incoming.landing.finish).add_done_callback(finished)

    def _completed(self, incoming: _Incoming, rows: Any) -> None:
        incoming.rows = rows
        incoming.ready = True
        self._moved.set()

    # ----------------------------------------------------------------- hearing

    def take_channel(self, src: int, channel: Channel) -> None:
        """Take a producer's channel."""
        inlet = self._inlets.get(src)
        if inlet is None or inlet.channel is not None:
            self.seat.engine.fabric.forget(channel)
            return
        inlet.connect(channel)
        channel.subscribe(partial(self._hear_producer, inlet), partial(self._line_ended, inlet))

    def _hear_producer(self, inlet: _Inlet, message: Message) -> None:
        word = inlet.hear(message.header)
        if word is None or self.seat.fault is not None:
            return
        kind, *rest = word
        if kind == "rows":
            if not self._left:
                try:
                    self._land(inlet, rest[0], rest[1], message.buffers)
                except Exception as error:  # as above
                    self._abort(error)
            return
        if kind == "have":
            self._ledger.announce(inlet.number, rest[0])
        elif kind == "closed":
            inlet.closed = True
            self._ledger.announce(inlet.number, rest[0], closed=True)
        elif kind == "terms":
            self._check_terms(inlet, rest[0])
        elif kind == "format":
            self._take_format(inlet, rest[0])
        elif kind == "floor":
            self._floor = rest[0]
            return
        elif kind == "over":
            self._floor = rest[0]
            inlet.ended = True
            if all(each.ended for each in self._inlets.values()):
                self._finish()
            return
        elif kind == "failed":
            if not self._parted:
                self._begin_ending(rest[0])
        elif kind == "refused":
            self._refuse(rest[0])
        self._schedule_pump()

    def _check_terms(self, inlet: _Inlet, theirs: str) -> None:
        mine = str(self.seat.terms)
        if theirs != mine:
            me = self.seat.name_of(self.seat.engine.rank)
            self._refuse(Refusal("mismatch", (self.seat.group, ((self.seat.name_of(inlet.rank), theirs), (me, mine)))))

    def _take_format(self, inlet: _Inlet, form: Format) -> None:
        inlet.format = form
        for other in self._inlets.values():
            if other.format is not None and other.format != form:
                said = ((self.seat.name_of(each.rank), str(each.format)[:4000]) for each in (other, inlet))
                self._refuse(Refusal("mismatch", (self.seat.group, tuple(said))))
                return
        self._format = self._format or form

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
        if rank in self.seat.terms.consumers:
            self._farewell.take(self.seat.terms.consumers.index(rank), None)
            self._see_the_end()

    def _begin_ending(self, why: Ending) -> None:
        """Give out no more rounds before it is known to which one the furthest has come; have the others do so."""
        fresh = not self._farewell.begun
        self._farewell.begin(why, self._given)
        if fresh:
            for inlet in self._inlets.values():
                inlet.tell("ended", why)
            for rank in self.seat.terms.consumers:
                if rank != self.seat.engine.rank:
                    self.seat.epoch.streams.post(rank, self.seat.key, ("bound", self._given, why))
        self._see_the_end()

    def _see_the_end(self) -> None:
        if self._farewell.end is not None:
            self._ledger.cut(self._farewell.end)
        if not self._farewell.pending:
            self._schedule_pump()
            self._moved.set()

    def _refuse(self, refusal: Refusal) -> None:
        """End the stream with an error for all: the producers tell the other consumers."""
        if self.seat.fault is None and not self._over:
            for inlet in self._inlets.values():
                inlet.tell("refused", refusal)
            # The producers end it, each when it was told: also one whose channel is yet to come.
            self._break_off(refusal.error)

    def _abort(self, error: BaseException) -> None:
        """This member cannot go on: the others end where it does, and it raises the error."""
        if self.seat.fault is None and not self._left:
            self._begin_ending(failure(self.seat.engine.rank, error))
            self._part()
            self.seat.fault = lambda: error
            self._moved.set()

    def _break_off(self, fault: Callable[[], BaseException]) -> None:
        """Raise an error in every call from now on."""
        if self.seat.fault is None and not self._parted:
            self.seat.fault = fault
            self._queue.clear()
            self._moved.set()

    def _finish(self) -> None:
        self._over = True
        self._queue.clear()
        if self._done_timer is not None:
            self._done_timer.cancel()
        self.seat.epoch.streams.leave(self.seat.key)
        for inlet in self._inlets.values():
            inlet.ended = True
            if inlet.channel is not None:
                self.seat.engine.fabric.forget(inlet.channel)

    def _line_ended(self, inlet: _Inlet, error: Exception) -> None:
        """A producer is gone; one whose rows are all here may go."""
        if inlet.ended:
            return
        inlet.ended = True
        if all(each.ended for each in self._inlets.values()):
            self.seat.epoch.streams.leave(self.seat.key)
        if self._drained or self._parted or self.seat.fault is not None:
            return  # what waits here can still be given out

        def tell() -> None:
            member = self.seat.engine.members[inlet.rank]
            self._refuse(Refusal("lost", (member.role, member.rank, str(error))))

        self.seat.engine.loop.call_soon(tell)  # the group may know better in a moment

    def end(self) -> None:
        """The group's epoch has ended."""
        if not self._over:
            self._break_off(self.seat.group_fault)
            self._finish()

    def abandon(self, reason: str) -> None:
        """Nobody takes batches any more: the actor's call that made the stream has failed, or it was dropped."""
        self.leave(done=False)


def _place(landing: Landing, runs: list[Run], parts: list[int], buffers: Sequence[memoryview]) -> None:
    """Put a piece into a batch: its parts hold the rows of its runs one after the other."""
    each = len(buffers) // max(1, len(parts))
    run_number = offset = 0
    for number, rows in enumerate(parts):
        start = 0
        while start < rows:
            run = runs[run_number]
            count = min(rows - start, run.rows - offset)
            landing.place(run, offset, count, buffers[number * each : (number + 1) * each], start)
            start += count
            offset += count
            if offset == run.rows:
                run_number, offset = run_number + 1, 0
