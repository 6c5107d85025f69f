"""What runs beside each actor, in its process and on its loop: it brings the actor up, speaks for it, takes it down.

The same under every runtime. It does what the gang orders, one phase after another, and reports how each ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from actors import _protocol as protocol
from actors._context import ActorContext, current, user_tasks
from actors._control import PORT, Introduction, Lost, Order, Phase, Report, pack, unpack
from actors._dispatch import Dispatcher
from actors._names import Named
from actors._pickling import dumps_error
from actors._roster import Roster
from actors.abc import ProcessId
from actors.actor import connect, create
from actors.errors import RemoteCancelled
from collective.errors import LinkError
from collective.freight import name_endpoint
from collective.links import boot_id
from collective.types import Address, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from actors.abc import Launch
    from actors.actor import Actor
    from collective.abc import Channel, Endpoint
    from collective.by_reference import Request, Share
    from collective.group import Group
    from collective.store import TensorRef, TensorStore
    from collective.types import GroupSpec

Blueprint: TypeAlias = "tuple[type[Actor], tuple[Any, ...], Mapping[str, Any]]"

CALLS_SECONDS = 1.0
"""What calls that run are given to end once they are cancelled, before `teardown` goes ahead without them."""
STOP_SECONDS = 1.0
"""What a `setup` or a `teardown` that was cut short is given to end."""
CLOSE_SECONDS = 0.5
"""What the groups are given to close."""

_logger = logging.getLogger("actors")


class Host:
    """Runs one actor.

    :param make: returns class, args and kwargs of the actor; called once, as part of its construction. Nothing of them
        is kept beyond that.
    """

    def __init__(self, launch: Launch, endpoint: Endpoint, make: Callable[[], Blueprint]) -> None:
        self.launch = launch
        self.leaving = False
        self._endpoint = endpoint
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._channel: Channel
        self._actor: Actor
        self._groups: dict[str, Group] = {}
        self._dispatcher: Dispatcher | None = None
        self._roster: Roster | None = None
        self._set_up = False
        self._store: TensorStore | None = None
        self._thread = threading.get_ident()
        name_endpoint(endpoint, str(launch))
        self._phase: asyncio.Task[None] | None = None
        # One context for all that is done for the actor: what __init__ sets in it is there in setup and in calls.
        self._context = copy_context()
        self._self = ActorContext(launch.role, launch.rank, launch.gang, endpoint, self._loop)
        self._context.run(current.set, self._self)

    async def serve(self) -> bool:
        """Run the actor until the gang orders its end, or is gone; return whether it was ordered. Closes the endpoint.

        Raises:
            LinkError: the gang could not be reached.
        """
        launch, endpoint = self.launch, self._endpoint
        try:
            endpoint.grant(launch.member)
            endpoint.grant(launch.calls, (protocol.port(launch.uid),))
            link = await endpoint.connect(launch.home, launch.member)
            introduction = Introduction(launch.role, launch.rank, endpoint.address, own_process())
            if launch.backends:
                # Importing torch takes a second and more; done in a thread, it overlaps with the start of the others.
                with contextlib.suppress(RuntimeError):  # No thread to be had: the groups import it when they form.
                    threading.Thread(target=_preload, args=(launch.backends,), name="preload", daemon=True).start()
            self._channel = link.open(PORT, pack(introduction))
            self.leaving = await self._obey()
        finally:
            await self._stop_phase()
            if not self.leaving:
                await self._end_calls()
            await self._end_own()
            # Before the groups: all members leave now, and none has to tell the others.
            await endpoint.aclose()
            await self._leave_groups()
            if self._store is not None:
                self._store.close()
        return self.leaving

    async def _obey(self) -> bool:
        while True:
            try:
                message = await self._channel.receive()
            except LinkError:
                return False
            note = unpack(message.header)
            if isinstance(note, Lost):
                self._mourn(note)
                continue
            assert isinstance(note, Order)
            match note.phase:
                case Phase.CONSTRUCTOR:
                    self._begin(note.phase, self._construct)
                case Phase.GROUPS:
                    self._begin(note.phase, partial(self._form_groups, message.buffers[0]))
                case Phase.SETUP:
                    self._begin(note.phase, self._set_up_actor)
                case Phase.TEARDOWN:
                    await self._stop_phase()
                    self._begin(note.phase, self._tear_down)
                case Phase.CLOSE:
                    return True
                case _:
                    raise AssertionError(f"no order: {note}")

    # Phases.

    def _begin(self, phase: Phase, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        name = f"{self.launch} {phase.value}"
        self._phase = self._loop.create_task(self._perform(phase, work), name=name, context=self._context)

    async def _stop_phase(self) -> None:
        if self._phase is not None and not self._phase.done():
            self._phase.cancel()
            _, stuck = await asyncio.wait([self._phase], timeout=STOP_SECONDS)
            for task in stuck:
                _logger.warning("%s does not end though it was cancelled; going on without it", task.get_name())

    async def _perform(self, phase: Phase, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what a phase takes and report how it ended."""
        where = f"{self.launch} in its {phase.value}"
        record = None
        try:
            await work()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            record = dumps_error(RemoteCancelled(where).with_traceback(error.__traceback__), (__name__,))
        except BaseException as error:  # SystemExit too: it is the actor's failure, not the end of this loop
            record = dumps_error(error, (__name__,))
        try:
            await self._channel.send(pack(Report(phase, record)))
        except LinkError:
            _logger.debug("%s: the gang is gone; nobody hears that its %s has ended", self.launch, phase.value)

    async def _construct(self) -> None:
        cls, args, kwargs = self._make()
        launch = self.launch
        self._actor = create(
            cls, tuple(args), kwargs, role=launch.role, rank=launch.rank, make_store=self._make_store
        )

    def _make_store(self) -> TensorStore:
        """Return the actor's store, made at its first use: actors without need no numpy."""
        if threading.get_ident() != self._thread:
            return asyncio.run_coroutine_threadsafe(self._make_store_on_loop(), self._loop).result()
        if self._store is None:
            from collective.store import TensorStore, default_limit

            launch = self.launch
            limit = launch.store_bytes if launch.store_bytes is not None else default_limit()
            self._store = TensorStore(self._endpoint, owner=f"{launch} of gang {launch.gang!r}", limit=limit)
        return self._store

    async def _make_store_on_loop(self) -> TensorStore:
        return self._make_store()

    async def _form_groups(self, data: memoryview) -> None:
        launch = self.launch
        roster = self._roster = Roster.loads(data)
        own = roster.groups_of(launch.role, launch.rank)
        if own:
            await self._form(roster, own)
        groups = Named(
            {spec.name: self._groups[spec.name] for spec, _ in own},
            lambda name: (
                f"{launch} is no member of group {name!r} of its gang"
                if name in roster.handles.groups
                else f"{launch} has no group {name!r}"
            ),
        )
        connect(self._actor, groups=groups, gang=roster.handles)

    async def _take_part(self, request: Request, share: Share) -> TensorRef | None:
        """Do this member's part of a collective over references."""
        from collective.by_reference import take_part

        return await take_part(self._groups[request.group], self._make_store, request, share)

    async def _reset_group(self, name: str) -> None:
        """Do this member's part of a reset that somebody else asks for."""
        await self._groups[name].reset()

    async def _form(self, roster: Roster, own: Sequence[tuple[GroupSpec, int]]) -> None:
        launch = self.launch
        from collective.formation import form_group  # imports numpy, which an actor without groups may not need

        async def form(spec: GroupSpec, rank: int) -> None:
            self._groups[spec.name] = await form_group(
                self._endpoint,
                spec,
                roster.members[spec.name],
                rank,
                key=f"{launch.gang}/{spec.name}",
                credential=launch.member,
            )

        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                for spec, rank in own:
                    tasks.create_task(form(spec, rank), name=f"{launch} forms {spec.name}")
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure

    async def _set_up_actor(self) -> None:
        launch = self.launch
        self._dispatcher = Dispatcher(
            self._actor,
            self._endpoint,
            role=launch.role,
            rank=launch.rank,
            gang=launch.gang,
            uid=launch.uid,
            threads=launch.threads,
            beside={protocol.TAKE_PART: self._take_part, protocol.RESET_GROUP: self._reset_group},
        )
        self._dispatcher.start(setup=asyncio.current_task())
        await self._actor.setup()
        self._set_up = True
        self._dispatcher.open()

    async def _tear_down(self) -> None:
        """End the calls, then let the actor clean up, if it was ever set up; then end what it has left."""
        await self._end_calls()
        try:
            if self._set_up:
                self._set_up = False
                await self._actor.teardown()
        finally:
            await self._end_own()

    async def _end_own(self) -> None:
        """End the gangs and tasks that the actor's own code has started and left."""
        for gang in list(self._self.gangs):
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await gang.aclose()
            except Exception:
                _logger.exception("%s: gang %s, which it had left, did not end in good order", self.launch, repr(gang))
        this = asyncio.current_task()
        if tasks := [task for task in user_tasks(self._endpoint) if task is not this]:
            for task in tasks:
                task.cancel()
            _, stuck = await asyncio.wait(tasks, timeout=STOP_SECONDS)
            for task in stuck:
                text = "%s: %s does not end though it was cancelled; going on without it"
                _logger.warning(text, self.launch, repr(task))

    async def _end_calls(self) -> None:
        if self._dispatcher is None:
            return
        try:
            async with asyncio.timeout(CALLS_SECONDS):
                await self._dispatcher.aclose()
        except TimeoutError:
            _logger.warning("%s: calls do not end though they were cancelled; going on without them", self.launch)

    async def _leave_groups(self) -> None:
        groups, self._groups = self._groups, {}
        try:
            async with asyncio.timeout(CLOSE_SECONDS), asyncio.TaskGroup() as tasks:
                for group in groups.values():
                    tasks.create_task(group.aclose())
        except Exception:
            _logger.exception("%s: its groups did not close in good order", self.launch)

    def _mourn(self, lost: Lost) -> None:
        for group in self._groups.values():
            group.peer_lost(Member(lost.role, lost.rank, Address("")), lost.cause)


def _preload(backends: tuple[str, ...]) -> None:
    from collective import _backends, formation  # noqa: F401

    _backends.preload(backends)


def own_process() -> ProcessId:
    """Return what identifies this process."""
    return ProcessId(os.getpid(), f"{boot_id()} {os.stat('/proc/self/ns/pid').st_ino}")
