"""What lives for one epoch of a group."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from collective._backends import make_plane
from collective._core.agreement import Agreement
from collective._core.cards import Cards
from collective._core.flows import Flows
from collective._core.lanes import Lane
from collective._core.mailbox import Mailbox
from collective._core.pipeline import Pipeline
from collective._core.row_streams import Streams
from collective.abc import AnnouncingPlane, PlaneContext

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine

    from collective._core.agreement import Announcing, Calls, Record
    from collective._core.engine import Engine
    from collective._core.pipeline import Pending


class Epoch:
    """What lives for one epoch of a group: after it, nothing of it is delivered."""

    def __init__(self, number: int, engine: Engine) -> None:
        self.number = number
        self.next_place = 0
        self.pending: dict[int, Pending] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.fault: Callable[[], Exception] | None = None
        """What every operation raises, once the epoch is broken."""
        self.mismatches: dict[int, Calls] = {}
        self.on_end: list[Callable[[str], None]] = []
        self._cut: int | None = None
        """Set where the epoch is broken from a place on, and what comes before it still completes."""
        self._held: list[tuple[int, Record, Any, bytes | None]] | None = []
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

        def fail(place: int, error: BaseException) -> None:
            if place in self.pending:
                engine.faults.on_library_failed(self, self.pending[place], error)

        on_agreed = partial(engine.on_agreed, self)
        by_messages = Agreement(
            engine.rank,
            engine.size,
            loop=engine.loop,
            post=post,
            on_agreed=on_agreed,
            on_mismatch=partial(engine.faults.on_mismatch, self),
        )
        if not isinstance(self.plane, AnnouncingPlane) or engine.size == 1:
            return by_messages
        return Cards(
            engine.rank,
            engine.size,
            loop=engine.loop,
            plane=self.plane,
            disputes=by_messages,
            post=post,
            on_agreed=on_agreed,
            on_failure=fail,
        )

    @property
    def broken(self) -> bool:
        """Whether nothing completes any more."""
        return self.fault is not None and self._cut is None

    def refuses(self, place: int) -> bool:
        """Whether a collective at a place fails at its call."""
        return self.fault is not None and (self._cut is None or place >= self._cut)

    def cut(self, place: int, error: Callable[[], Exception]) -> None:
        """Refuse what comes at a place and after it."""
        if not self.refuses(place):
            self.fault, self._cut = error, place

    def announce(self, place: int, record: Record, meta: Any = None, brief: bytes | None = None) -> None:
        """Say what this member called at a place, once the epoch has begun."""
        if self._held is not None:
            self._held.append((place, record, meta, brief))
        else:
            self.agreement.announce(place, record, meta, brief)

    def begin(self) -> None:
        """All members have opened it: go on with what was called in another task meanwhile."""
        held, self._held = self._held or [], None
        for said in held:
            self.announce(*said)

    @property
    def drained(self) -> bool:
        """Whether the epoch was cut, and nothing before the cut is pending or can still be called."""
        return self._cut is not None and self.next_place >= self._cut and not self.pending

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that is cancelled when the epoch ends, perhaps before its first step."""
        task = self._fabric.spawn(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def forget(self, pending: Pending) -> None:
        """Drop a collective that is done."""
        self.pending.pop(pending.place, None)
        if self.drained:
            self._on_drained()

    def take_from(self, place: int) -> list[Pending]:
        """Take out what is pending at a place and after it."""
        return [self.pending.pop(number) for number in sorted(self.pending) if number >= place]

    def end(self, error: Callable[[], Exception], why: str) -> None:
        """Fail all that is pending, each with an error of its own, and end the groups split from this one."""
        self._cut = self._held = None
        self.agreement.end()
        self.pipeline.clear()
        pending, self.pending = self.pending, {}
        for entry in pending.values():
            entry.fail(error())
        self.mailbox.end(error)
        self.flows.end()
        self.streams.end()
        self.lane.end(error)
        for task in self.tasks:
            task.cancel()
        callbacks, self.on_end = self.on_end, []
        for callback in callbacks:
            callback(why)
