"""Looks after collectives that not all have called: those that take too long, or wait for each other's threads.

Plain methods run one at a time. So two broadcast calls of plain methods can wait for each other: on one member the
first holds the thread and the second waits for it, on another it is the other way round, and each waits in a collective
for all members. Members whose collectives wait tell rank 0 which calls hold and await their actors' threads. Where that
makes a cycle, the youngest call of it ends on every member, and the others go on.
"""

from __future__ import annotations

import math
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from collective._core import tree
from collective.scopes import Call, Ending

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from collective._core.engine import Engine
    from collective._core.pipeline import Pending

    Report: TypeAlias = tuple[Sequence[tuple[Any, ...]], Sequence[tuple[Any, ...]]]

STALL: Final = 0.1
"""Seconds after which a collective that waits is told of; then after twice as many more, and so on up to LATER."""
LATER: Final = 5.0


class Watchdog:
    """One member's, for one group."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf
        self._told = False
        """Whether rank 0 was told of any such calls, and that they still wait."""
        self._doubtful: set[int] = set()
        """At rank 0: who has been asked once more."""
        self._sure = False
        self._threads: dict[int, tuple[set[Call], set[Call]]] = {}
        """At rank 0: the calls that hold the threads of each member's actor, and those that wait for one."""

    def add(self, pending: Pending) -> None:
        """Look after a collective that is not agreed."""
        now = self._engine.loop.time()
        pending.due, pending.stalls = now + self._engine.timeout, now + STALL
        self._look_at(min(pending.due, pending.stalls))

    def again(self, pending: Pending, seconds: float) -> None:
        """Give a collective some more time."""
        pending.due = self._engine.loop.time() + seconds
        self._look_at(pending.due)

    def close(self) -> None:
        """Look after nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._at = None, math.inf

    def hear(self, rank: int, report: Report | None) -> None:
        """Take what a member says of its actor's threads, at rank 0, or None, which asks it; pass on along the tree."""
        engine = self._engine
        if report is not None and engine.rank:
            self._post(tree.parent(engine.rank), rank, report)
        elif report is not None:
            self._take(rank, report)
        elif rank == engine.rank:
            self.tell(asked=True)
        else:
            hop = rank
            while tree.parent(hop) != engine.rank:
                hop = tree.parent(hop)
            self._post(hop, rank, None)

    def _take(self, src: int, report: Report) -> None:
        holding, waiting = report
        self._threads[src] = {Call(*call) for call in holding}, {Call(*call) for call in waiting}
        self._doubtful.discard(src)
        if self._doubtful:
            return
        stuck = _stuck(list(self._threads.values()))
        if stuck and not self._sure:
            # What others have said may be old. Who waits for ever, waits still when they have said it again.
            self._sure = True
            self._doubtful = {rank for rank, (held, _) in self._threads.items() if held & stuck}
            for rank in list(self._doubtful):
                self.hear(rank, None)
            return
        self._sure = False
        if stuck:
            self._end_youngest(stuck)

    def tell(self, *, asked: bool = False) -> None:
        """Tell rank 0 which calls hold the actor's threads while they wait for others, and which wait for a thread."""
        engine = self._engine
        holding, waiting = engine.parts.threads()
        stuck = {call for each in engine.parts.engines for call in each.current.waiting_calls()}
        # One that does not wait ends some time, and gives its thread to the next.
        known = [call for call in holding if call is not None and call in stuck]
        if not waiting or len(known) < len(holding):
            known, waiting = [], []
        if known or self._told or asked:
            self._told = bool(known)
            self.hear(engine.rank, ([tuple(call) for call in known], [tuple(call) for call in waiting]))

    def _post(self, hop: int, rank: int, report: Report | None) -> None:
        self._engine.fabric.post(hop, ("threads", self._engine.current.number, rank, report))

    def _end_youngest(self, stuck: set[Call]) -> None:
        engine = self._engine
        holders = {call for held, _ in self._threads.values() for call in held}
        calls = sorted(holders & stuck, key=lambda call: call.id)  # the others wait for these, and for nothing else
        for known in self._threads.values():
            for each in known:
                each.discard(calls[-1])
        cause = (
            f"{' and '.join(call.name for call in calls)} wait for each other: on some members the one holds the "
            "worker threads of plain methods, on some the other, and each waits there for all members; raise "
            "Role(threads=), make the methods async, or do not call them at the same time"
        )
        engine.end_scope(calls[-1].id, Ending(engine.rank, engine.me, "", "", cause))

    def _look_at(self, when: float) -> None:
        if when < self._at:
            self.close()
            self._at = when
            # In a context of its own: it must not keep that of a call, which is over when nothing holds it any more.
            self._timer = self._engine.loop.call_at(when, self._look, context=Context())

    def _look(self) -> None:
        engine = self._engine
        self._timer, self._at = None, math.inf
        now = engine.loop.time()
        stalled, following = False, math.inf
        epoch = engine.current
        for pending in list(epoch.pending.values()):
            if pending.agreed or not pending.due:
                continue
            if pending.due <= now:
                pending.due = math.inf  # until the others have said whether they have come
                engine.faults.on_overdue(epoch, pending)
            if pending.stalls <= now:
                stalled = True
                pending.stalls = now + min(LATER, 2 * (STALL + now - pending.stalls))
            following = min(following, pending.due, pending.stalls)
        if stalled:
            self.tell()
        if following < math.inf:
            self._look_at(following)


def _stuck(threads: Sequence[tuple[set[Call], set[Call]]]) -> set[Call]:
    """Return the calls that can never go on: each waits on some member for threads that only others of them hold."""
    stuck = {call for _, waiting in threads for call in waiting}
    while True:
        free = {call for call in stuck if not any(call in w and h and h <= stuck for h, w in threads)}
        if not free:
            return stuck
        stuck -= free
