"""Which actor the running code belongs to."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from collective.scopes import context_of

if TYPE_CHECKING:
    from actors.gang import Gang
    from collective.abc import Endpoint


@dataclass(frozen=True, eq=False)
class ActorContext:
    """An actor as its own code sees it: handles used in it dial from its endpoint, on its loop."""

    role: str
    rank: int
    gang: str
    endpoint: Endpoint
    loop: asyncio.AbstractEventLoop
    gangs: set[Gang] = field(default_factory=set)
    """Those that it started and has not ended."""

    def __str__(self) -> str:
        return f"{self.role}[{self.rank}]"


current: ContextVar[ActorContext | None] = ContextVar("gangline_actor", default=None)
"""Set by the host for `__init__`, `setup` and `teardown`, by the dispatcher for calls; tasks inherit it."""

_ROOMS = ("actors", "collective", "scheduling")
_FOR_USERS = ("actors._caller", "actors.handles")
"""Modules of ours whose coroutines users make tasks of."""
_census: dict[asyncio.AbstractEventLoop, dict[Endpoint, list[asyncio.Task[Any]]]] = {}


def user_tasks(endpoint: Endpoint) -> list[asyncio.Task[Any]]:
    """Return the tasks that the code of the actor at an endpoint has started on this loop, and that have not ended.

    All actors that ask in one turn of the loop share one look at its tasks: there may be a thousand actors.
    """
    loop = asyncio.get_running_loop()
    found = _census.get(loop)
    if found is None:
        found = _census[loop] = defaultdict(list)
        for task in asyncio.all_tasks():
            if not _is_ours(task) and (actor := context_of(task).get(current)) is not None:
                found[actor.endpoint].append(task)
        loop.call_soon(_census.pop, loop)
    return [task for task in found.get(endpoint, ()) if not task.done()]


def _is_ours(task: asyncio.Task[Any]) -> bool:
    """Whether it is part of this library, which ends with its endpoint or its group."""
    module: str = getattr(getattr(task.get_coro(), "cr_frame", None), "f_globals", {}).get("__name__", "")
    return module.partition(".")[0] in _ROOMS and module not in _FOR_USERS
