"""Row streams: data of rows, from producers of any number and pace to consumers that all get as many batches."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from collective import scopes
from collective._integers import integer
from collective._rows.consumer import Consumer
from collective._rows.ledger import Order, Tail
from collective._rows.producer import Producer
from collective._rows.setup import Seat, Terms
from collective.errors import GroupClosed, WrongThread
from collective.types import RowState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from collective.group import Group


class RowBatch:
    """One batch of a row stream. It is the consumer's own: nothing else uses its memory.

    :ivar rows: a dict of arrays of the kind that the producers put, or a `pyarrow.RecordBatch`.
    :ivar state: where to go on once every consumer has done this batch's round; None under order="arrival".
    """

    def __init__(self, rows: Any, size: int, valid_rows: int, state: RowState | None) -> None:
        self.rows = rows
        self.state = state
        self._size = size
        self._valid_rows = valid_rows

    @cached_property
    def valid(self) -> np.ndarray:
        """Which rows are no padding: a bool array. All are, but in the last round of a stream with tail="pad".

        Padding comes last in a batch. It is zero in arrays and null in Arrow rows.
        """
        return np.arange(self._size) < self._valid_rows

    def __getitem__(self, column: str) -> Any:
        """Return a column."""
        return self.rows[column]

    def __len__(self) -> int:
        """Return the number of rows, padding included: the stream's batch_size."""
        return self._size

    def __repr__(self) -> str:
        padding = f", {self._size - self._valid_rows} of them padding" if self._valid_rows < self._size else ""
        return f"<RowBatch of {self._size} rows{padding}>"


class RowStream:
    """One pass of rows from the producers of a group to its consumers; every one of both makes it, with equal terms.

    Producers `put` blocks of rows of any size, then `close`. Each consumer iterates, `async for batch in stream`, and
    gets as many batches as every other, each of exactly `batch_size` rows. A round is one batch for each consumer; it
    is given out only once all its rows are announced, so that nobody ever waits for a batch that the others got.

    The order of the rows is the first row of each producer, then the second of each, and so on; a producer that has
    closed is passed over. It depends neither on how the rows were cut into blocks nor on time, and the slowest open
    producer sets the pace. With order="arrival" each round is of one producer, whichever has one: nobody waits for
    the slow, the counts are equal still, but consumers may get the rounds in different orders; what is left of each
    producer at its end is dealt in the order above.

    What fails is raised by every later call on every member that takes part: a member's death as PeerLost, different
    columns or terms as RowsMismatch, a broken group as GroupBroken. A stream ends with its group's epoch. Leaving
    `async with stream` closes it; by an exception it is the producer's failure, or the consumer's leaving. A stream
    whose call failed, or that was dropped, ends so, too. Belongs to its group's event loop.

    :param group: or what `group.scope(key)` returns. Streams of the same roles are paired by their scope, and in it by
        the order in which they are made.
    :param producers: the role whose members put rows; `consumers`: the role whose members iterate.
    :param batch_size: rows of a batch.
    :param order: "round-robin" or "arrival".
    :param tail: what becomes of rows at the end that do not fill a round. "drop" drops them, "pad" deals them evenly
        and fills their batches up (see `RowBatch.valid`), "error" raises RowsLeftOver on every consumer.
    :param budget: bytes of rows that one member holds at most: a producer those that wait to be fetched, a consumer
        those that it has asked for. A slow consumer so slows the producers. At least a round; by default two, and
        8 MiB where that is less.
    :param resume: go on from what `state` returned, maybe with another number of consumers or batch size. Each
        producer goes on with its row number `stream.position`.

    Raises:
        ValueError, TypeError: a bad argument. GroupClosed, WrongThread, GroupBroken, PeerLost: the group's state.
    """

    def __init__(
        self,
        group: Group,
        *,
        producers: str,
        consumers: str,
        batch_size: int,
        order: Order = "round-robin",
        tail: Tail = "drop",
        budget: int | None = None,
        resume: RowState | None = None,
    ) -> None:
        engine = group._engine
        self._loop = engine.loop
        self._end: Producer | Consumer | None = None
        self._group = group
        self._enter("RowStream()")
        terms = self._terms = _terms(group, producers, consumers, batch_size, order, tail, budget, resume)
        fault = engine.fault()
        if fault is not None:
            raise fault
        scope = scopes.scope_of_messages(engine, group._scope())
        scopes.touch(engine, scope)
        key = engine.current.streams.next_key(producers, consumers, scope.bytes)
        seat = Seat(engine, key, terms)
        if engine.rank in terms.producers:
            self._end = Producer(seat, terms.producers.index(engine.rank))
        else:
            self._end = Consumer(seat, terms.consumers.index(engine.rank))
        scopes.note_made(self._end)

    # Producers

    @property
    def position(self) -> int:
        """On a producer: the number of its next row, from 0 in a fresh pass; also how many the stream has taken.

        Raises:
            TypeError: this member is a consumer.
        """
        return self._producer("position").position

    async def put(self, rows: Any, *, share: bool = False) -> None:
        """Put a block of rows; wait while the budget is full. The rows may be changed when it returns.

        A put that is cancelled has put nothing, or the rows before `position`: only where the block takes more than
        the budget less a round is it taken piece by piece. Puts of several tasks go one after the other.

        :param rows: a dict of numpy, torch or cupy arrays with equal first dimensions, a pyarrow RecordBatch or
            Table. Every block of every producer has the same columns.
        :param share: keep the arrays themselves instead of a copy; they are not to be changed any more. Arrow rows
            always are.

        Raises:
            ValueError, TypeError: the rows cannot be sent, or are not like those before; or a round takes more than
            the budget. ConsumerLeft: a consumer left the stream, and it ends for all. ProducerFailed: another producer
            failed. StreamClosed: after `close`.
        """
        await self._producer("put()").put(rows, share=share)

    def fail(self, error: Exception) -> None:
        """End the stream by an error, which every consumer raises after the last round that any of them has got."""
        self._producer("fail()").fail(error)

    # Consumers

    def __aiter__(self) -> Self:
        """Iterate over this consumer's batches; one task at a time."""
        self._consumer("iterating")
        return self

    async def __anext__(self) -> RowBatch:
        """Wait for the next batch. The one before it counts as done now. Who is cancelled has taken none.

        Raises:
            RowsLeftOver: at the end, with tail="error". ProducerFailed: a producer failed by something that cannot
            travel; what can is raised itself, caused by a ProducerFailed. StreamClosed: after `close`.
        """
        rows, valid, positions = await self._consumer("iterating").next()
        terms = self._terms
        state = RowState(positions, terms.origins) if terms.order == "round-robin" else None
        return RowBatch(rows, terms.batch_size, valid, state)

    # Both

    async def close(self) -> None:
        """On a producer, say that no more rows come, and wait until the consumers have fetched those they want.

        On a consumer before its end, leave, with the last batch done: the stream ends for all at one round, the last
        that any of them has got by now. Idempotent.
        """
        self._enter("close()")
        if isinstance(self._end, Producer):
            await self._end.close()
        elif isinstance(self._end, Consumer):
            self._end.leave(done=True)

    def state(self) -> RowState:
        """Return what every consumer is known to have done: whole rounds, up to the last that all have done.

        A batch is done when its consumer asks for the next one, or closes. News of that take some 50 ms, so the state
        may be a little behind, never ahead. Consumers that checkpoint in step use `batch.state`.
        """
        assert self._end is not None
        done = self._end.done
        return RowState(done, self._terms.origins if self._terms.order == "round-robin" else done)

    @property
    def held_bytes(self) -> int:
        """Bytes of rows that wait on this member, of which the budget is the bound."""
        assert self._end is not None
        return self._end.held

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        elif isinstance(self._end, Producer):
            self._end.fail(error if isinstance(error, Exception) else f"it was ended by {type(error).__name__}")
        elif isinstance(self._end, Consumer):
            self._end.leave(done=False)

    def __repr__(self) -> str:
        return f"<{self._terms} of group {self._group.name!r}>"

    def __del__(self) -> None:
        end = getattr(self, "_end", None)
        if end is not None and not end.finished and not self._loop.is_closed():
            # Whoever waits for this member must not wait for ever.
            self._loop.call_soon_threadsafe(end.abandon, "its RowStream was dropped before it was closed")

    def _enter(self, operation: str) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            raise WrongThread(self._group.name, operation)
        if self._group._engine.closed and self._end is None:
            raise GroupClosed(self._group.name, operation)

    def _producer(self, operation: str) -> Producer:
        self._enter(operation)
        if not isinstance(self._end, Producer):
            raise TypeError(f"{operation} of {self!r} on a consumer; only producers have it")
        return self._end

    def _consumer(self, operation: str) -> Consumer:
        self._enter(operation)
        if not isinstance(self._end, Consumer):
            raise TypeError(f"{operation} of {self!r} on a producer; only consumers have it")
        return self._end


def _terms(
    group: Group,
    producers: str,
    consumers: str,
    batch_size: int,
    order: Order,
    tail: Tail,
    budget: int | None,
    resume: RowState | None,
) -> Terms:
    """Check the arguments of a stream."""
    givers, takers = group.ranks(producers), group.ranks(consumers)
    if producers == consumers:
        raise ValueError(f"producers and consumers are both {producers!r}; they are two roles of the group")
    if group.rank not in givers and group.rank not in takers:
        member = group.members[group.rank]
        raise ValueError(f"{member} is neither of the producers {producers!r} nor of the consumers {consumers!r}")
    batch_size = _count("batch_size", batch_size)
    if budget is not None:
        budget = _count("budget", budget)
    for name, value, known in (("order", order, get_args(Order)), ("tail", tail, get_args(Tail))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, known))}")
    if resume is None:
        resume = RowState((0,) * len(givers), (0,) * len(givers))
    elif not isinstance(resume, RowState):
        raise TypeError(f"resume is {resume!r}; what RowStream.state() returned")
    elif len(resume.positions) != len(givers):
        raise ValueError(
            f"resume is the state of a stream of {len(resume.positions)} producers, and role {producers!r} has "
            f"{len(givers)} members; rows are resumed by the same number of producers"
        )
    return Terms(
        tuple(givers), tuple(takers), batch_size, order, tail, budget, resume.positions, resume.origins
    )


def _count(name: str, value: Any) -> int:
    count = integer(value, name)
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1")
    return count
