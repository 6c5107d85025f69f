"""What lives for one epoch of a group."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from collective import scopes
from collective._backends import make_plane
from collective._core.agreement import Agreement
from collective._core.cards import Cards
from collective._core.flows import Flows
from collective._core.lanes import Lane
from collective._core.mailbox import Mailbox
from collective._core.pipeline import Pipeline
from collective._core.row_streams import Streams
from collective._core.verdicts import Verdicts
from collective.abc import AnnouncingPlane, PlaneContext
from collective.errors import GroupBroken
from collective.scopes import KEPT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    from collective._core.agreement import Announcing, Calls
    from collective._core.engine import Engine
    from collective._core.pipeline import Pending
    from collective.scopes import Call, Ending, Scope


class Epoch:
    """What lives for one epoch of a group: after it, nothing of it is delivered."""

    def __init__(self, number: int, engine: Engine) -> None:
        self.number = number
        self.called = 0
        """Collectives that this member has called."""
        self.agreed = 0
        """Collectives that all have called: the place of the next one in the order that they agreed on."""
        self.pending: dict[int, Pending] = {}
        """What is not done, by its number among this member's calls."""
        self.tasks: set[asyncio.Task[Any]] = set()
        self.fault: Callable[[], Exception] | None = None
        """What every operation raises, once the epoch is broken."""
        self.doom: Callable[[], Exception] | None = None
        """What sends and receives raise, once it is known that the epoch will break: as soon as collectives that come
        before what breaks it have been called by all."""
        self.reset_at: int | None = None
        """The place from which on a reset ends it. Members that are not as far may need this one's data plane."""
        self.on_end: set[Callable[[str], None]] = set()
        """What ends the groups that were split from this one and are open still."""
        self._group = engine.name
        self._mismatches: dict[bytes, tuple[int, Calls]] = {}
        self._cut: int | None = None
        """Set where the epoch is broken from a place on, and what comes before it still completes."""
        self._held: list[Callable[[], None]] | None = []
        """What was announced before the epoch began; None from then on."""
        self._on_drained = partial(engine.faults.on_drained, self)
        self._fabric = engine.fabric
        post = engine.fabric.post
        tcp = engine.endpoint.address.tcp
        self.mailbox = Mailbox(
            engine.rank,
            me=f"{engine.me} of group {engine.name!r}",
            epoch=number,
            fabric=engine.fabric,
            tell=lambda rank, message, buffers: post(rank, ("mail", number, message), buffers),
            spawn=self.spawn,
            on_failure=partial(engine.faults.on_transfer_failed, self),
            on_cut_off=partial(engine.faults.on_transfer_ended, self),
            group=engine.name,
            parts=engine.parts,
            ended=engine.ended,
            on_waiting=engine.watchdog.tell,
            recv_timeout=engine.recv_timeout,
            overdue=engine.faults.overdue_recv,
        )
        self.flows = Flows(
            number,
            fabric=engine.fabric,
            tell=lambda rank, message, buffers: post(rank, ("flow", number, *message), buffers),
            spawn=self.spawn,
            on_failure=partial(engine.faults.on_transfer_failed, self),
        )
        self.streams = Streams(
            lambda rank, key, message: post(rank, ("stream", number, key, message)),
            engine.fabric.forget,
            parts=engine.parts,
            shared=engine.endpoint.address.shm is not None,
        )
        self.lane = Lane(engine, post=lambda rank, message: post(rank, ("lane", number, message)))
        self.plane = make_plane(
            engine.backend,
            PlaneContext(
                group=engine.name,
                key=f"{engine.key}@{number}",
                rank=engine.rank,
                size=engine.size,
                tell=lambda rank, message: post(rank, ("plane", number, message)),
                timeout=engine.timeout,
                interface="127.0.0.1" if tcp is None else tcp[0],
                hosts=tuple(member.address.host for member in engine.members),
            ),
        )
        self.agreement = self._make_agreement(engine)
        self.pipeline = Pipeline(
            self.plane,
            on_issued=self.agreement.issued,
            on_done=self.forget,
            on_failure=partial(engine.faults.on_library_failed, self),
        )

    def _make_agreement(self, engine: Engine) -> Announcing:
        def post(rank: int, message: tuple[Any, ...]) -> None:
            engine.fabric.post(rank, ("agree", self.number, message))

        verdicts = Verdicts(engine, self)
        if not isinstance(self.plane, AnnouncingPlane) or engine.size == 1:
            return Agreement(engine.rank, engine.size, loop=engine.loop, post=post, listener=verdicts)
        return Cards(engine.rank, engine.size, loop=engine.loop, plane=self.plane, post=post, listener=verdicts)

    @property
    def broken(self) -> bool:
        """Whether nothing completes any more."""
        return self.fault is not None and self._cut is None

    def cut(self, place: int, error: Callable[[], Exception]) -> None:
        """Let nothing be agreed at a place or after it; fail what cannot be, once all before it is known."""
        if self._cut is None and self.fault is not None:
            return
        if self._cut is None or place < self._cut:
            self.fault, self._cut = error, place
        self.mailbox.end(error)
        self.take_cut()

    def take_cut(self) -> None:
        """Fail what comes after the cut, once what comes before it is known to be agreed."""
        if self._cut is None or self.agreed < self._cut or self.fault is None:
            return
        cut = self._cut
        for entry in [each for each in self.pending.values() if not each.agreed or each.seq >= cut]:
            if not entry.issued:  # else it fails when the data plane is abandoned, which may be at its memory till then
                del self.pending[entry.number]
                entry.fail(self._failure(entry, self.fault))
        if self.drained:
            self._on_drained()

    def needs(self, place: int) -> bool:
        """Whether anything that this member has called comes at a place of the agreed order or after it."""
        return any(not entry.agreed or entry.seq >= place for entry in self.pending.values())

    def waiting_in(self, scope: bytes) -> list[Pending]:
        """Return what this member has called in a scope and not all others."""
        return [entry for entry in self.pending.values() if not entry.agreed and entry.scope.bytes == scope]

    def waiting_calls(self) -> set[Call]:
        """Return the calls that wait here for other members."""
        calls = [entry.part.call for entry in self.pending.values() if not entry.agreed and entry.part is not None]
        return {call for call in calls + self.mailbox.waiting_calls() if call is not None}

    def note_mismatch(self, scope: bytes, place: int, calls: Calls) -> None:
        """Keep what members called at the front of a scope for the call that this one has not made yet."""
        self._mismatches[scope] = place, calls
        while len(self._mismatches) > KEPT:
            del self._mismatches[next(iter(self._mismatches))]

    def mismatch(self, scope: Scope) -> Exception | None:
        """Return the error of a call in a scope where the others had called other things, once."""
        known = self._mismatches.pop(scope.bytes, None)
        return known and scopes.mismatch(self._group, scope, *known)

    def _failure(self, pending: Pending, error: Callable[[], Exception]) -> Exception:
        """Return the error of what is pending where the epoch ends: of what nobody could pair with, that."""
        failure = error()
        if pending.agreed or not isinstance(failure, GroupBroken):
            return failure
        return self.mismatch(pending.scope) or failure

    def announce(self, pending: Pending) -> None:
        """Say what this member called, once the epoch has begun."""
        if self._held is not None:
            self._held.append(partial(self.agreement.announce, pending))
        else:
            self.agreement.announce(pending)

    def end_scope(self, root: bytes, ending: Ending) -> None:
        """Announce nothing of a scope any more."""
        if self._held is not None:
            self._held.append(partial(self.agreement.end_scope, root, ending))
        else:
            self.agreement.end_scope(root, ending)

    def begin(self) -> None:
        """All members have opened it: go on with what was called in another task meanwhile."""
        held, self._held = self._held or [], None
        for say in held:
            say()

    @property
    def done_before(self) -> int:
        """The place in the agreed order before which this member has finished all."""
        return min((entry.seq for entry in self.pending.values() if entry.agreed), default=self.agreed)

    @property
    def idle(self) -> bool:
        """Whether the data plane does nothing for this member."""
        return not any(entry.issued for entry in self.pending.values())

    @property
    def drained(self) -> bool:
        """Whether the epoch was cut, and nothing before the cut is pending."""
        cut = self._cut
        return cut is not None and self.agreed >= cut and all(entry.seq >= cut for entry in self.pending.values())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that is cancelled when the epoch ends, perhaps before its first step."""
        task = self._fabric.spawn(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def forget(self, pending: Pending) -> None:
        """Drop a collective that is done."""
        self.pending.pop(pending.number, None)
        if self.drained:
            self._on_drained()

    def end(self, error: Callable[[], Exception], why: str) -> None:
        """Fail all that is pending, each with an error of its own, and end the groups split from this one."""
        self._cut = self._held = None
        self.agreement.end()
        self.pipeline.clear()
        pending, self.pending = self.pending, {}
        for entry in pending.values():
            entry.fail(self._failure(entry, error))
        self.mailbox.end(error)
        self.flows.end()
        self.streams.end()
        self.lane.end(error)
        for task in self.tasks:
            task.cancel()
        for callback in tuple(self.on_end):
            callback(why)
        self.on_end.clear()
