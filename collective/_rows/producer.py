"""A producer's end of a row stream: it keeps its rows until the consumers fetch them."""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective._core.offload import LONG, offload, offload_through
from collective._gate import Gate
from collective._rows.formats import format_of
from collective._rows.ledger import nearest
from collective._rows.serving import Outlet
from collective._rows.setup import LAG, LITTLE, Ending, Refusal, failure
from collective.errors import CollectiveError, LinkError, StreamClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from collective._rows.formats import Block, Format, Storage
    from collective._rows.ledger import Positions
    from collective._rows.setup import Seat
    from collective.abc import Channel, Message

_ANNOUNCE_DELAY = 0.001


class Producer:
    """See `collective.rows.RowStream`.

    :ivar position: the number of the next row to put.
    """

    def __init__(self, seat: Seat, number: int) -> None:
        terms = seat.terms
        self.seat = seat
        self.position = terms.positions[number]
        self._number = number
        self._format: Format | None = None
        self._storage: Storage | None = None
        self._budget = 0
        self._sent = 0
        self._announced = self._start = self.position
        self._timer: asyncio.TimerHandle | None = None
        self._floor = terms.positions
        self._floor_timer: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self._moved = asyncio.Event()
        """Set when what a put or a close waits for may have come."""
        self._ending: Ending | None = None
        self._over = False
        self.closed = False
        self._outlets = [Outlet(rank, terms.positions) for rank in terms.consumers]
        seat.epoch.streams.enter(seat.key, self)
        for outlet in self._outlets:
            outlet.tell("terms", str(terms))
            seat.epoch.spawn(self._serve(outlet))

    # ------------------------------------------------------ what the user does

    async def put(self, rows: Any, *, share: bool) -> None:
        """Take a block of rows."""
        await asyncio.sleep(0)  # the others' turn; who is cancelled here has put nothing
        async with self._lock:
            self._check("put()")
            block = await self._block(rows)
            start = 0
            while start < block.rows:
                count = await self._room(block, start)
                assert self._storage is not None
                staged = self._storage.stage(block, start, start + count, keep=share or block.lasting)
                if staged.nbytes > LONG:
                    await offload_through(staged.fill)
                    self._check("put()")
                else:
                    staged.fill(Gate())
                self._storage.add(staged)
                self.position = self._storage.end
                start += count
                self._announce_soon()

    async def close(self) -> None:
        """Say that no more rows come, and wait until the consumers have fetched those that they want."""
        async with self._lock:
            self._raise_fault()
            if not self.closed:
                self.closed = True
                self._stop_timer()
                self._announced = self.position
                self._tell_all("closed", self.position)
        while not self._drained():
            self._moved.clear()
            await self._moved.wait()
            self._raise_fault()

    def fail(self, error: BaseException | str) -> None:
        """End the stream for all by an error. What was announced is still there for who is behind the others."""
        if self.closed or self._ending is not None or self.seat.fault is not None:
            return
        rank = self.seat.engine.rank
        ending = failure(rank, error) if isinstance(error, BaseException) else Ending(rank, error, failed=True)
        self.closed = True
        self._stop_timer()
        self._tell_all("failed", ending)

    @property
    def done(self) -> Positions:
        """What all consumers are known to have done."""
        return self._floor

    @property
    def held(self) -> int:
        """Bytes of rows that wait here."""
        return 0 if self._storage is None else self._storage.held

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do at the end of the stream."""
        return self.closed or self._ending is not None or self.seat.fault is not None

    # ----------------------------------------------------------------- putting

    def _check(self, operation: str) -> None:
        self._raise_fault()
        if self.closed:
            raise StreamClosed(self.seat.group, operation)
        if self._ending is not None:
            raise self._ending.for_producer(self.seat)

    def _raise_fault(self) -> None:
        if self.seat.fault is not None:
            raise self.seat.fault()

    async def _block(self, rows: Any) -> Block:
        form = self._format or format_of(rows)
        columns = rows.values() if isinstance(rows, dict) else ()
        if sum(int(getattr(column, "nbytes", 0)) for column in columns if not _lies_flat(column)) > LONG:
            block = await offload(partial(form.block, rows))  # which has to copy those
            self._check("put()")
        else:
            block = form.block(rows)
        if self._format is None and (block.rows or form.exact):  # rows that vary tell nothing where there are none
            self._begin(form)
        return block

    def _begin(self, form: Format) -> None:
        """Take the first block's format for that of all."""
        self._budget = self.seat.terms.budget_for(form.row_bytes)
        self._check_budget(form.row_bytes, form)
        self._format = form
        self._storage = form.storage(self._start, self._budget, self.seat.epoch.streams.pool)
        self._tell_all("format", form)

    def _check_budget(self, row_bytes: float, form: Format) -> None:
        terms = self.seat.terms
        needed = int(row_bytes * terms.round_rows)
        if terms.budget is None:
            self._budget = max(self._budget, needed)
        elif needed > terms.budget:
            refusal = Refusal(
                "budget",
                (
                    f"budget is {terms.budget} bytes and a round of {len(terms.consumers)} consumers x "
                    f"{terms.batch_size} rows takes {needed} ({form}, {row_bytes:.0f} bytes a row, on "
                    f"{self.seat.name_of(self.seat.engine.rank)}); pass RowStream(budget=...) of a round at the least, "
                    "or a smaller batch_size",
                ),
            )
            self.refuse(refusal)
            raise refusal.error()

    async def _room(self, block: Block, start: int) -> int:
        """Wait until some rows of a block may be taken, and return how many."""
        row_bytes = block.nbytes / block.rows
        rest = block.rows - start
        while True:
            self._check("put()")
            assert self._storage is not None
            assert self._format is not None
            room = self._budget - self._storage.held
            if rest * row_bytes <= room:
                return rest
            waiting = self._storage.end - self._start - self._sent
            need = self.seat.terms.round_rows - waiting
            if need > 0:  # the consumers may be waiting for these to fill a round
                if not self._format.exact:
                    self._check_budget(row_bytes, self._format)
                if (waiting + rest) * row_bytes <= self._budget:
                    return rest  # memory that is held for a few rows of a block splits no other block
                return min(rest, max(need, int(room / row_bytes)))
            self._moved.clear()
            await self._moved.wait()

    def _announce_soon(self) -> None:
        assert self._format is not None
        starved = self._announced - self._start == self._sent
        if starved or (self.position - self._announced) * self._format.row_bytes >= LITTLE:
            self._announce()
        elif self._timer is None:
            self._timer = self.seat.engine.loop.call_later(_ANNOUNCE_DELAY, self._announce)

    def _announce(self) -> None:
        self._stop_timer()
        if self._announced < self.position and not self.finished:
            self._announced = self.position
            self._tell_all("have", self.position)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell_all(self, *word: Any) -> None:
        for outlet in self._outlets:
            outlet.tell(*word)

    # ----------------------------------------------------------------- serving

    async def _serve(self, outlet: Outlet) -> None:
        """Send a consumer the rows that it asks for."""
        seat = self.seat
        try:
            channel = await seat.engine.fabric.open_data(outlet.rank, (seat.epoch.number, "stream", seat.key))
        except CollectiveError as error:
            seat.engine.faults.on_transfer_failed(seat.epoch, outlet.rank, error)
            return
        outlet.connect(channel)
        if outlet.ended:
            seat.engine.fabric.forget(channel)
            return
        channel.subscribe(partial(self._hear, outlet), partial(self._line_ended, outlet))
        try:
            while not outlet.ended:
                await outlet.wake.wait()
                outlet.wake.clear()
                while outlet.wanted:
                    assert self._storage is not None
                    assert self._format is not None
                    sent = await outlet.send(self._storage, self._format, channel, seat.epoch.streams.pool)
                    self._sent += sent  # not in one statement: other consumers' rows are counted during the await
                    self._moved.set()
        except LinkError as error:
            self._line_ended(outlet, error)
        except Exception as error:  # rows that cannot be encoded, say: nobody awaits this, and all wait for the rows
            member = seat.engine.members[seat.engine.rank]
            text = f"{type(error).__name__}: {error}"
            self.refuse(Refusal("failed", (seat.group, member.role, member.rank, text)))

    def _hear(self, outlet: Outlet, message: Message) -> None:
        word = outlet.hear(message.header)
        if word is None:
            return
        kind, *rest = word
        if kind == "pull":
            outlet.wanted.extend(rest[0])
            outlet.wake.set()
        elif kind == "done":
            self._take_done(outlet, rest[0])
        elif kind == "drained":
            outlet.drained = True
            self._moved.set()
        elif kind == "ended":
            self._ending = self._ending or rest[0]
            self._moved.set()
        elif kind == "parted":
            self._take_done(outlet, rest[0])
            outlet.drained = outlet.parted = True
            self._moved.set()
            if all(each.parted for each in self._outlets):
                self._part()
        elif kind == "refused":
            self.refuse(rest[0])

    def _take_done(self, outlet: Outlet, positions: Positions) -> None:
        outlet.done = positions
        floor = nearest([each.done for each in self._outlets])
        if floor != self._floor:
            self._floor = floor
            if self._floor_timer is None:
                self._floor_timer = self.seat.engine.loop.call_later(LAG, self._tell_floor)

    def _tell_floor(self) -> None:
        self._floor_timer = None
        # Each consumer hears from one producer how far the others are.
        for outlet in self._outlets[self._number % len(self.seat.terms.producers) :: len(self.seat.terms.producers)]:
            outlet.tell("floor", self._floor)

    def _drained(self) -> bool:
        return all(outlet.drained for outlet in self._outlets)

    def _part(self) -> None:
        """Every consumer has come to the end: so has the stream."""
        if not self._over:
            self._tell_all("over", self._floor)
            self._finish()

    # ----------------------------------------------------------------- trouble

    def refuse(self, refusal: Refusal) -> None:
        """End the stream with an error for all."""
        if self.seat.fault is None:
            self._tell_all("refused", refusal)
            self._break_off(refusal.error)

    def _break_off(self, fault: Callable[[], BaseException]) -> None:
        """Raise an error in every call from now on."""
        if self.seat.fault is None and not self._over:
            self.seat.fault = fault
            self._moved.set()
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._stop_timer()
        if self._floor_timer is not None:
            self._floor_timer.cancel()
        self.seat.epoch.streams.leave(self.seat.key)
        if self._storage is not None:
            self._storage.clear()
        for outlet in self._outlets:
            outlet.ended = True
            outlet.wake.set()
            outlet.wanted.clear()
            if outlet.channel is not None:
                self.seat.engine.fabric.forget(outlet.channel)

    def _line_ended(self, outlet: Outlet, error: Exception) -> None:
        """A consumer is gone; one that has fetched all it wants may go."""
        if outlet.ended:
            return
        outlet.ended = True
        outlet.wake.set()
        if outlet.drained:
            outlet.parted = True
            if all(each.parted for each in self._outlets):
                self._part()
            return
        self.seat.line_ended(outlet.rank, error, self)

    # What the registry of streams does.

    def take_channel(self, src: int, channel: Channel) -> None:
        """Producers open the channels: nobody opens one to them."""
        self.seat.engine.fabric.forget(channel)

    def hear(self, src: int, message: tuple[Any, ...]) -> None:
        """Consumers speak to one another that way, not to producers."""

    def peer_left(self, rank: int) -> None:
        """A consumer that closes its group closes its channel, too."""
        self.seat.peer_left(rank)

    def end(self) -> None:
        """The group's epoch has ended."""
        self._break_off(self.seat.group_fault)

    def abandon(self, reason: str) -> None:
        """Nobody puts rows any more: the actor's call that made the stream has failed, or it was dropped."""
        error = sys.exception()
        self.fail(error if isinstance(error, Exception) else reason)


def _lies_flat(column: Any) -> bool:
    """Whether the bytes of a column need no copy to lie one after the other in host memory."""
    return isinstance(column, np.ndarray) and column.flags.c_contiguous
