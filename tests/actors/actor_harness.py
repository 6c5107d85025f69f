"""Actors without a gang: a dispatcher each, on endpoints of this process, reached over a chosen kind of link."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import uvloop

from actors import Handle, Handles
from actors._dispatch import Dispatcher
from actors._interface import Interface
from actors._protocol import port
from actors._target import Target
from actors.actor import create
from collective.links import open_endpoint
from collective.types import Credential

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

KINDS = ("memory", "unix", "shm")
GANG = "team"


def run(kind: str, main: Coroutine[Any, Any, Any]) -> Any:
    """Run a test: sockets under uvloop, as in production, memory under asyncio's own loop."""
    return uvloop.run(main) if kind != "memory" else asyncio.run(main)


class Team:
    """The actors of one role, as a test sees them: handles as callers have them, instances as no caller has."""

    def __init__(self) -> None:
        self.handles: Handles[Any]
        self.instances: list[Any] = []
        self.dispatchers: list[Dispatcher] = []
        self.endpoints: list[Any] = []

    def __getitem__(self, rank: int) -> Handle[Any]:
        return self.handles[rank]


@asynccontextmanager
async def team(
    kind: str,
    cls: type,
    count: int = 1,
    *,
    role: str = "worker",
    threads: int = 1,
    native: Callable[[], Any] | None = None,
) -> AsyncIterator[Team]:
    """Serve `count` actors of a class."""
    made = Team()
    interface = Interface.of(cls)
    handles = []
    async with AsyncExitStack() as stack:
        for rank in range(count):
            endpoint = await stack.enter_async_context(await open_endpoint(kinds=(kind,)))
            uid = uuid4().hex
            credential = Credential(f"call/{uid}", os.urandom(32))
            endpoint.grant(credential, (port(uid),))
            instance = create(cls, (), {}, role=role, rank=rank)
            dispatcher = Dispatcher(instance, endpoint, role=role, rank=rank, gang=GANG, uid=uid, threads=threads)
            dispatcher.start()
            stack.push_async_callback(dispatcher.aclose)
            target = Target(endpoint.address, GANG, role, rank, uid, credential, interface, native=native)
            handles.append(Handle[Any](target))
            made.instances.append(instance)
            made.dispatchers.append(dispatcher)
            made.endpoints.append(endpoint)
        made.handles = Handles(role, interface, handles)
        yield made
