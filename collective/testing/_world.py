"""A whole group in one process: every rank with an endpoint of its own, joined by memory links."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TypeVar

from collective.formation import form_group
from collective.links import open_endpoint
from collective.testing._arrays import make
from collective.types import Address, Credential, GroupSpec, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

    import numpy as np

    from collective.abc import Endpoint
    from collective.group import Group
    from collective.testing._arrays import Array
    from collective.work import Work

T = TypeVar("T")

TIMEOUT = 20.0
"""Seconds that a group of a world waits for its members, unless the check says otherwise."""


class Each(list[Any]):
    """An argument that differs from rank to rank: the value of each, in rank order."""


class World:
    """The ranks of one group, and what a check does with them.

    :ivar groups: what each rank holds, in rank order.
    :ivar endpoints: each rank's endpoint; `endpoints[r].abort()` is the death of rank r.
    :ivar kinds: the kind of array that each rank uses.
    :ivar hosts: the host on which each rank pretends to be.
    :ivar link: the kind of link that joins them.
    :ivar unseen: what reached the loop's exception handler; a check that leaves anything here has failed.
    """

    def __init__(
        self,
        backend: str,
        kinds: Sequence[str],
        endpoints: Sequence[Endpoint],
        *,
        roles: Sequence[str],
        hosts: Sequence[str],
        link: str,
        timeout: float,
    ) -> None:
        self.backend = backend
        self.hosts = tuple(hosts)
        self.link = link
        self.kinds = tuple(kinds)
        self.endpoints = list(endpoints)
        self.groups: list[Group] = []
        self.unseen: list[dict[str, Any]] = []
        self._roles = roles
        self._timeout = timeout
        self._formed: list[Group] = []
        self._key = uuid.uuid4().hex

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.endpoints)

    @property
    def ranks(self) -> range:
        """Every rank."""
        return range(self.size)

    def _address(self, rank: int) -> Address:
        address = self.endpoints[rank].address
        return replace(address, host=self.hosts[rank]) if self.hosts[rank] else address

    def member(self, rank: int) -> str:
        """Return how messages name the member of that group-local rank, as in "worker[1]"."""
        return str(self._members()[rank])

    def make(self, rank: int, values: np.ndarray, form: str = "contiguous") -> Array:
        """Return a new array of that rank's kind."""
        return make(self.kinds[rank], values, form)

    def spread(self, parts: Sequence[np.ndarray], form: str = "contiguous") -> Each:
        """Return a new array for each rank, of its kind."""
        return Each(self.make(rank, part, form) for rank, part in enumerate(parts))

    def only(self, rank: int, value: object) -> Each:
        """Return an argument that is `value` on one rank and None on the others."""
        return Each(value if other == rank else None for other in self.ranks)

    async def form(self, name: str, *, recv_timeout: float | None = None) -> list[Group]:
        """Form another group over the same endpoints."""
        async with asyncio.TaskGroup() as tasks:
            joining = [tasks.create_task(self.join(name, rank, recv_timeout=recv_timeout)) for rank in self.ranks]
        return [task.result() for task in joining]

    async def join(
        self, name: str, rank: int, *, backend: str | None = None, recv_timeout: float | None = None
    ) -> Group:
        """Take one rank's part in forming a group of that name."""
        spec = GroupSpec(name, tuple(dict.fromkeys(self._roles)), backend or self.backend, self._timeout, recv_timeout)
        members = self._members()
        key = f"{name}.{self._key}"
        group = await form_group(self.endpoints[rank], spec, members, rank, key=key, credential=_CREDENTIAL)
        self._formed.append(group)
        return group

    async def call(self, operation: Callable[..., Work[Any]], *args: Any, **options: Any) -> list[Any]:
        """Issue an operation, as in `call(Group.allreduce, arrays)`, on every rank, then await all.

        :param args: after the group; an Each gives each rank its own.

        Returns the results in rank order.

        Raises:
            ExceptionGroup: of every error, where there was any.
        """
        return values(await outcomes([issue(operation, group, *args, **options) for group in self.groups]))

    async def each(self, program: Callable[[Group], Coroutine[Any, Any, T]]) -> list[T]:
        """Run a program on every rank, each in a task of its own; return the results in rank order."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(program(group)) for group in self.groups]
        return [task.result() for task in running]

    async def reset(self) -> None:
        """Reset the group on every rank."""
        async with asyncio.TaskGroup() as tasks:
            for group in self.groups:
                tasks.create_task(_wait(group.reset()))

    async def aclose(self) -> None:
        """Close every group, then every endpoint."""
        for group in self._formed:
            await group.aclose()
        for endpoint in self.endpoints:
            await endpoint.aclose()

    def _members(self) -> list[Member]:
        return [
            Member(role, self._roles[:rank].count(role), self._address(rank)) for rank, role in enumerate(self._roles)
        ]


_CREDENTIAL = Credential("conformance", b"conformance conformance conformance")


@asynccontextmanager
async def world(
    backend: str,
    size: int,
    *,
    kinds: Sequence[str] | None = None,
    timeout: float = TIMEOUT,  # noqa: ASYNC109 (the group's, not this call's)
    roles: Mapping[str, int] | None = None,
    hosts: Sequence[str] = ("",),
    link: str = "memory",
) -> AsyncIterator[World]:
    """Open a world of `size` ranks and form its group.

    :param kinds: the kind of array of each rank; numpy on all by default.
    :param timeout: the group's, in seconds.
    :param roles: how many members each role has, in rank order; all are workers by default.
    :param hosts: the hosts on which the ranks pretend to be, in turn.
    :param link: the kind of link that joins them.
    """
    names = [role for role, count in (roles or {"worker": size}).items() for _ in range(count)]
    endpoints = [await open_endpoint(kinds=(link,)) for _ in range(size)]
    places = list(islice(cycle(hosts), size))
    opened = World(backend, kinds or ["numpy"] * size, endpoints, roles=names, hosts=places, link=link, timeout=timeout)
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: opened.unseen.append(context))
    try:
        for endpoint in endpoints:
            endpoint.grant(_CREDENTIAL)
        opened.groups = await opened.form("group")
        yield opened
    finally:
        await opened.aclose()
        loop.set_exception_handler(before)


async def _wait(awaitable: Awaitable[object]) -> None:
    await awaitable


def issue(operation: Callable[..., Any], group: Group, *args: Any, **options: Any) -> Any:
    """Issue an operation on one rank: each argument that is an Each is that rank's value of it."""
    own = [_own(value, group.rank) for value in args]
    return operation(group, *own, **{name: _own(value, group.rank) for name, value in options.items()})


def _own(value: Any, rank: int) -> Any:
    return value[rank] if isinstance(value, Each) else value


async def outcome(work: Awaitable[Any] | BaseException) -> Any:
    """Await something and return its result or its error; what `attempt` returned may be passed as it is."""
    if isinstance(work, BaseException):
        return work
    try:
        return await work
    except Exception as error:
        return error


async def outcomes(works: Iterable[Awaitable[Any] | BaseException]) -> list[Any]:
    """Return the outcome of each."""
    return [await outcome(work) for work in works]


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call something; return its result, as a rule a Work, or the error that it raised at the call."""
    try:
        return function(*args, **options)
    except Exception as error:
        return error


def refused(kind: type[Exception], function: Callable[..., Any], *args: Any, **options: Any) -> Exception:
    """Assert that a call raises such an error at once, and return the error."""
    result = attempt(function, *args, **options)
    assert isinstance(result, kind), f"the call gave {result!r}; it must raise {kind.__name__}"
    return result


def values(results: Sequence[Any]) -> list[Any]:
    """Return results, or raise the errors among them together."""
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        raise ExceptionGroup("members failed", errors)
    return list(results)


async def turns(count: int = 20) -> None:
    """Let the loop make some turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a condition holds; the check's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.001)
