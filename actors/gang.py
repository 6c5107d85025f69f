"""A gang: actors and their groups, started together and ended together."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import secrets
from typing import TYPE_CHECKING, Any, TypeVar, overload

from actors import _runtimes
from actors._context import current
from actors._control import PORT, Phase
from actors._crew import Crew
from actors._interface import Interface
from actors._names import known
from actors._protocol import port
from actors._roster import Roster
from actors._scopes import entered
from actors._target import Target, note_closed
from actors.abc import Launch
from actors.actor import Actor
from actors.errors import NotReady
from actors.role import Role
from collective import _backends
from collective.formation import choose_backend
from collective.types import Credential, GroupSpec, Member
from scheduling.background import to_the_end
from scheduling.templates import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType
    from typing import Self

    from actors.abc import Runtime
    from actors.groups import GroupHandle
    from actors.handles import Handles
    from collective.scopes import Key
    from collective.types import Address
    from scheduling.abc import Placement

A = TypeVar("A", bound=Actor)

START_TIMEOUT = 60.0
_PACK = pack()
_TEMPLATES = ("pack", "spread", "strict_pack", "strict_spread")
_logger = logging.getLogger("actors")


class Gang:
    """Roles and groups as one thing: `async with Gang(...) as gang` starts all of it or nothing, and ends all of it.

    A start makes room for every actor, constructs them, forms the groups, and runs every `setup`. Leaving ends running
    calls, runs every `teardown`, and returns when nothing is left; within 5 seconds, whatever the actors do. Each actor
    has 2.5 seconds for its teardown; then its process is killed, so that what `atexit` holds is not run.

    `gang["trainer"]` and `gang[role]` are Handles; a type checker knows the second. `gang.groups["dp"]` is a
    GroupHandle.

    :param groups: collective groups of these roles; each actor finds its own in `self.groups`.
    :param placement: how the actors are spread over nodes; runtime "ray" only.
    :param runtime: "ray", one process an actor, or "inproc", tasks of this process.
    :param start_timeout: seconds for the whole start, waiting for resources included.
    :param name: for people; need not be unique.

    Raises:
        ValueError, TypeError: names that are unknown or used twice, arguments that do not fit: before anything moves.
    """

    def __init__(
        self,
        *roles: Role[Any],
        groups: Iterable[GroupSpec] = (),
        placement: Placement = _PACK,
        runtime: str = "ray",
        start_timeout: float = START_TIMEOUT,
        name: str = "gang",
    ) -> None:
        self.name = name
        self.roles = tuple(roles)
        if isinstance(groups, GroupSpec | str):
            raise TypeError(f"groups is {groups!r}; it must be a sequence of GroupSpec: groups=[GroupSpec(...)]")
        self._specs = tuple(groups)
        _check_roles(self.roles)
        if runtime not in _runtimes.NAMES:
            raise ValueError(f"unknown runtime {runtime!r}; {known(runtime, _runtimes.NAMES)}")
        _check_groups(self._specs, [role.name for role in self.roles], runtime)
        if isinstance(start_timeout, bool) or not isinstance(start_timeout, int | float):
            raise TypeError(f"start_timeout is {start_timeout!r}; it must be a number of seconds")
        if not start_timeout > 0:
            raise ValueError(f"start_timeout is {start_timeout!r}; it must be positive, in seconds")
        _check_placement(placement)
        placement.request([role.demand() for role in self.roles])
        self._placement = placement
        self._runtime_name = runtime
        self._start_timeout = float(start_timeout)
        self._id = f"{name}-{secrets.token_hex(4)}"
        self._runtime: Runtime | None = None
        self._crew: Crew | None = None
        self._roster: Roster | None = None
        self._entered = False
        self._closing: asyncio.Task[list[Exception]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hurry: asyncio.Future[None] | None = None
        self._on_end: Callable[[Gang], None] = lambda _: None

    @overload
    def __getitem__(self, role: str) -> Handles[Any]: ...
    @overload
    def __getitem__(self, role: Role[A]) -> Handles[A]: ...
    def __getitem__(self, role: str | Role[A]) -> Handles[Any]:
        """Return the handles of a role's actors, in rank order.

        Raises:
            KeyError: the gang has no such role. NotReady: it has not started.
        """
        names = [each.name for each in self.roles]
        if isinstance(role, Role) and role not in self.roles:
            raise KeyError(f"{role} is no role of gang {self.name!r}")
        name = role.name if isinstance(role, Role) else role
        if name not in names:
            raise KeyError(f"gang {self.name!r} has no role {name!r}; {known(name, names)}")
        return self._started().handles[name]

    @property
    def groups(self) -> Mapping[str, GroupHandle]:
        """References to its groups by name, for collectives over references: `gang.groups["dp"].allreduce(refs)`.

        Raises:
            NotReady: it has not started.
        """
        return self._started().handles.groups

    def scope(self, key: Key) -> AbstractContextManager[None]:
        """Make all calls to this gang in a block, and in the tasks that it starts, one scope.

        For groups that span several roles, which no single call reaches as a whole: `with gang.scope("step 3"):` around
        calls to each of them pairs what these do with each other, and with nothing that others do at the same time.
        Blocks of one process that are open at the same time share the scope of equal keys. The calls must reach every
        member of the groups that they use; one that fails ends the scope for all of them. Of two that an actor runs at
        once, the second raises GroupError where its collectives would pair with those of the first.

        :param key: a str, an int, bytes, or a tuple of these.

        Raises:
            TypeError: the key is something else.
        """
        return entered(self._id, key)

    async def __aenter__(self) -> Self:
        """Start every actor, or none.

        Raises:
            GangInfeasible, GangTimeout: there is no room. GangStartError: an actor failed, or was too slow.
            NotPicklable: a class or a constructor argument cannot travel. RuntimeError: it was started before.
        """
        if self._entered:
            raise RuntimeError(f"gang {self.name!r} was started before; make a new Gang of the same roles")
        self._entered = True
        self._loop = asyncio.get_running_loop()
        owner = current.get()
        if owner is not None and owner.loop is self._loop:
            owner.gangs.add(self)
            self._on_end = owner.gangs.discard
        try:
            await self._start()
        except BaseException:
            for error in await self._end():
                _logger.error("gang %s: a teardown failed after the start had failed", self._id, exc_info=error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.aclose()
            return
        for failure in await self._end():
            error.add_note(f"gang {self.name!r}: then a teardown failed: {type(failure).__name__}: {failure}")
            _logger.error("gang %s: a teardown failed", self._id, exc_info=failure)

    async def aclose(self) -> None:
        """End every actor and return when all is gone. Idempotent.

        A cancellation makes it hurry: nothing more is waited for, the actors are killed.

        Raises:
            ExceptionGroup: what the actors' `teardown` raised, and what the runtime met in ending them.
        """
        first = self._closing is None
        failures = await self._end()
        if first and failures:
            raise ExceptionGroup(f"teardown of gang {self.name!r}", failures)

    def __repr__(self) -> str:
        roles = ", ".join(f"{role.name} x {role.count}" for role in self.roles)
        return f"<Gang {self.name!r}: {roles}; on {self._runtime_name}>"

    def _started(self) -> Roster:
        if self._roster is None:
            raise NotReady(f"gang {self.name!r} has not started: use `async with` on it")
        return self._roster

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        runtime = self._runtime = await _runtimes.make_runtime(
            self._runtime_name, roles=self.roles, placement=self._placement, gang=self._id
        )
        home = await runtime.open(start_timeout=self._start_timeout)
        secret = secrets.token_bytes(32)
        member = Credential(f"gang/{secrets.token_hex(16)}", _derive(secret, "member"))
        launches = self._launches(secret, member, home.address)
        crew = self._crew = Crew(self._id, launches)
        home.grant(member, (PORT,))
        home.serve(PORT, crew.welcome)
        # Cancelled in the middle of this, the runtime still knows what it has launched.
        crew.watch(await runtime.launch(launches))
        try:
            async with asyncio.timeout_at(begun + self._start_timeout) as scope:
                await crew.constructed()
                roster = Roster(self._targets(crew), self._specs)
                await crew.perform(Phase.GROUPS, [roster.dumps()])
                await crew.perform(Phase.SETUP)
        except TimeoutError:
            if not scope.expired():
                raise
            raise crew.overdue(self._start_timeout) from None
        crew.started()
        self._roster = roster

    async def _end(self) -> list[Exception]:
        """End everything; return what went wrong with that."""
        loop = asyncio.get_running_loop()
        if self._closing is not None and self._closing.done():
            return self._closing.result()
        if self._loop is not None and self._loop is not loop:
            raise NotReady(
                f"gang {self.name!r} was started on another event loop"
                + (", which is closed: what is left of it ends with this process" if self._loop.is_closed() else "")
                + "; start and end a gang on one loop (in tests, give fixtures and tests the same one)"
            )
        if self._closing is None:
            self._entered = True
            self._hurry = loop.create_future()
            self._closing = loop.create_task(self._end_all(self._hurry), name=f"gang {self._id} ends")
        return await to_the_end(self._closing, on_cancel=self._make_haste)

    def _make_haste(self) -> None:
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    async def _end_all(self, hurry: asyncio.Future[None]) -> list[Exception]:
        failures: list[Exception] = []
        try:
            if self._crew is not None:
                failures += await self._crew.dismiss(hurry)
        finally:
            if self._runtime is not None:
                try:
                    await self._runtime.aclose()
                except ExceptionGroup as errors:
                    failures += errors.exceptions
            self._on_end(self)
            if self._crew is not None:
                self._crew.forget()
                note_closed(seat.launch.uid for seat in self._crew.seats if seat.lost is None)
        return failures

    def _launches(self, secret: bytes, member: Credential, home: Address) -> list[Launch]:
        launches = []
        for role in self.roles:
            specs = [spec for spec in self._specs if role.name in spec.roles]
            here = [Member(role.name, 0, home)]
            backends = tuple(dict.fromkeys(choose_backend(spec.backend, here) for spec in specs))
            for rank in range(role.count):
                uid = secrets.token_hex(16)
                calls = Credential(port(uid), _derive(secret, uid))
                launch = Launch(self._id, role.name, rank, uid, home, member, calls, role.threads, backends)
                launches.append(dataclasses.replace(launch, store_bytes=role.store_bytes))
        return launches

    def _targets(self, crew: Crew) -> Mapping[str, tuple[Target, ...]]:
        targets: dict[str, list[Target]] = {}
        interfaces = {role.name: Interface.of(role.cls) for role in self.roles}
        for seat in crew.seats:
            launch = seat.launch
            assert seat.process is not None
            targets.setdefault(launch.role, []).append(
                Target(
                    seat.address,
                    launch.gang,
                    launch.role,
                    launch.rank,
                    launch.uid,
                    launch.calls,
                    interfaces[launch.role],
                    native=seat.process.native,
                )
            )
        return {role: tuple(of_role) for role, of_role in targets.items()}


def _derive(secret: bytes, purpose: str) -> bytes:
    return hmac.digest(secret, purpose.encode(), "sha256")


def _check_roles(roles: Sequence[Role[Any]]) -> None:
    if not roles:
        raise ValueError("Gang(): a gang needs at least one role")
    seen = set()
    for role in roles:
        if not isinstance(role, Role):
            raise TypeError(f"Gang({role!r}): not a Role; groups, placement and the rest are keyword arguments")
        role.check()
        if role.name in seen:
            raise ValueError(f"role {role.name!r} is there twice; the names of a gang's roles must differ")
        seen.add(role.name)


def _check_placement(placement: object) -> None:
    if callable(getattr(placement, "request", None)) and not isinstance(placement, type):
        return
    name = placement if isinstance(placement, str) else getattr(placement, "__name__", "")
    meant = f"placement={name}(), with {name} from scheduling" if name in _TEMPLATES else "placement=scheduling.pack()"
    raise TypeError(f"placement is {placement!r}, which is no Placement; write it as in {meant}")


def _check_groups(groups: Sequence[GroupSpec], roles: Sequence[str], runtime: str) -> None:
    seen = set()
    for spec in groups:
        if not isinstance(spec, GroupSpec):
            raise TypeError(f"groups has {spec!r}; it must be a sequence of GroupSpec")
        if spec.name in seen:
            raise ValueError(f"group {spec.name!r} is there twice; the names of a gang's groups must differ")
        seen.add(spec.name)
        for role in spec.roles:
            if role not in roles:
                raise ValueError(f"group {spec.name!r}: the gang has no role {role!r}; {known(role, roles)}")
        backends = ("auto", *_backends.NAMES)
        if spec.backend not in backends:
            raise ValueError(f"group {spec.name!r}: unknown backend {spec.backend!r}; {known(spec.backend, backends)}")
        if spec.backend in _backends.IN_PROCESS and runtime not in _runtimes.IN_PROCESS:
            raise ValueError(
                f"group {spec.name!r}: backend {spec.backend!r} connects actors of one process, and those of runtime "
                f"{runtime!r} have one each; leave it at \"auto\""
            )
