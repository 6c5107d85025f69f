"""How a consumer gets its rows: it plans rounds, asks the producers for their rows, and puts batches together."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from collective._core.offload import LONG, offload
from collective._rows.ledger import Ledger
from collective._rows.setup import LITTLE, Line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective._core.warm import Pool
    from collective._rows.formats import Format, Landing
    from collective._rows.ledger import Round
    from collective._rows.order import Run
    from collective._rows.setup import Terms

_SPANS = 1000
"""Pieces that one word asks for."""


class Inlet(Line):
    """One producer, as a consumer sees it."""

    def __init__(self, rank: int, number: int) -> None:
        super().__init__()
        self.rank = rank
        self.number = number
        self.format: Format | None = None
        self.closed = False
        self.coming: deque[tuple[Incoming, list[Run]]] = deque()
        """What was asked for, in that order, in which it comes."""


class Incoming:
    """A batch on its way."""

    __slots__ = ("landing", "missing", "pulled", "ready", "round", "rows")

    def __init__(self, step: Round, landing: Landing) -> None:
        self.round = step
        self.landing = landing
        self.missing = 0
        self.pulled = False
        self.ready = False
        self.rows: Any = None


class Fetcher:
    """One consumer's batches, from planned to ready.

    :param on_ready: called when a batch has become ready, or when it has become known that no more will come.
    :param on_failure: called with what went wrong where nobody awaits it.

    :ivar queue: the batches on their way, in the order in which they are given out.
    """

    def __init__(
        self,
        terms: Terms,
        number: int,
        *,
        pool: Pool,
        on_ready: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.inlets = [Inlet(rank, n) for n, rank in enumerate(terms.producers)]
        self.ledger = Ledger(
            terms.positions,
            terms.origins,
            consumers=len(terms.consumers),
            batch=terms.batch_size,
            me=number,
            order=terms.order,
            tail=terms.tail,
        )
        self.queue: deque[Incoming] = deque()
        self.drained = False
        """Whether nothing is to be fetched any more."""
        self._terms = terms
        self._pool = pool
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._format: Format | None = None
        self._loading = False
        self._pump_soon = False
        self._stopped = False

    def take_format(self, inlet: Inlet, form: Format) -> Inlet | None:
        """Take note of a producer's columns; return a producer that has others, if there is one.

        Batches have the format of the first in rank order: what formats differ in may not depend on who is heard first.
        """
        inlet.format = form
        known = [other for other in self.inlets if other.format is not None]
        self._format = known[0].format
        return next((other for other in known if other.format != form), None)

    def allocate(self, header: bytes, sizes: Sequence[int]) -> list[memoryview]:
        """Return memory for rows that come: it is used again once they were placed."""
        return [self._pool.lend(size).data for size in sizes]

    @property
    def held(self) -> int:
        """Bytes of batches that are here or on their way."""
        return 0 if self._format is None else len(self.queue) * self._batch_bytes

    def stop(self) -> None:
        """Fetch nothing any more."""
        self._stopped = True
        self.queue.clear()

    @property
    def _batch_bytes(self) -> int:
        assert self._format is not None
        return max(1, self._format.row_bytes * self._terms.batch_size)

    def schedule(self) -> None:
        """Plan and ask for more, soon: what has changed until then is done at once."""
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Plan the rounds that are announced and that the budget admits, and ask for their rows."""
        self._pump_soon = False
        if self._stopped:
            return
        try:
            self._plan()
        except Exception as error:  # no memory, say: nobody awaits this, and the next batch must not be waited for
            self._on_failure(error)
            return
        if self.ledger.exhausted():
            self._on_ready()
            if not self.drained and all(not inlet.coming for inlet in self.inlets):
                self.drained = True
                for inlet in self.inlets:
                    inlet.tell("drained")

    def _plan(self) -> None:
        if self._may_plan() and self._format is not None:
            most = max(1, self._terms.budget_for(self._format.row_bytes) // self._batch_bytes)
            while len(self.queue) < most and (step := self.ledger.next_round()) is not None:
                self.queue.append(Incoming(step, self._format.landing(self._terms.batch_size, step.rows, self._pool)))
            self._pull()

    def _may_plan(self) -> bool:
        """Whether every producer's columns are known, and the library that holds them is there."""
        if any(inlet.format is None and not inlet.closed for inlet in self.inlets):
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
            self._on_failure(error)

    def _pull(self) -> None:
        fresh = [incoming for incoming in self.queue if not incoming.pulled]
        if not fresh:
            return
        on_the_way = any(inlet.coming for inlet in self.inlets)
        if on_the_way and len(fresh) * self._batch_bytes < LITTLE:
            return  # more may be asked for at once when that has come
        spans: dict[int, list[tuple[int, int]]] = {inlet.number: [] for inlet in self.inlets}
        for incoming in fresh:
            incoming.pulled = True
            runs: dict[int, list[Run]] = {}
            for run in incoming.round.runs:
                runs.setdefault(run.producer, []).append(run)
            for number, span in incoming.round.wanted().items():
                incoming.missing += 1
                spans[number].append(span)
                self.inlets[number].coming.append((incoming, runs[number]))
            if not incoming.missing:
                self._complete(incoming)
        for number, wanted in spans.items():
            for at in range(0, len(wanted), _SPANS):
                self.inlets[number].tell("pull", wanted[at : at + _SPANS])

    def land(self, inlet: Inlet, joined: bool, pieces: list[list[int]], buffers: list[memoryview]) -> None:
        """Take rows that have come, and put them where they belong."""
        assert self._format is not None
        if joined:
            buffers = self._format.split(list(itertools.chain.from_iterable(pieces)), buffers[0])
        jobs: list[tuple[Landing, list[Run], list[int], list[memoryview]]] = []
        landed: list[Incoming] = []
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

    def _placed(self, landed: list[Incoming], done: asyncio.Future[None]) -> None:
        error = done.exception()
        if error is None:
            self._count(landed)
        else:
            self._on_failure(error)

    def _count(self, landed: list[Incoming]) -> None:
        for incoming in landed:
            incoming.missing -= 1
            if not incoming.missing:
                self._complete(incoming)
        self.schedule()

    def _complete(self, incoming: Incoming) -> None:
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
                self._on_failure(error)

        offload(incoming.landing.finish).add_done_callback(finished)

    def _completed(self, incoming: Incoming, rows: Any) -> None:
        incoming.rows = rows
        incoming.ready = True
        self._on_ready()


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
