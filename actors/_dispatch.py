"""The answering side: an actor's port, where calls arrive."""

from __future__ import annotations

import asyncio
import struct
from contextvars import copy_context
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actors import _protocol as protocol
from actors._context import ActorContext, current
from actors._interface import Interface, Kind, wire_name
from actors._running import Ending, Running, Served
from actors._session import Session
from actors._threads import Workers
from collective.scopes import parts_at

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from actors.actor import Actor
    from collective.abc import Channel, Endpoint


class Dispatcher:
    """Takes the calls of one actor and runs them: async methods as tasks, plain ones in `threads` worker threads.

    Made on the actor's loop, in the context that calls shall run in a copy of. The endpoint must grant the port
    `calls/<uid>` to the credential that handles carry.

    :param beside: what else can be called, by names that no method can have.
    """

    def __init__(
        self,
        instance: Actor,
        endpoint: Endpoint,
        *,
        role: str,
        rank: int,
        gang: str,
        uid: str,
        threads: int = 1,
        beside: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]] = MappingProxyType({}),
    ) -> None:
        interface = Interface.of(type(instance))
        self.role = role
        self.rank = rank
        self.methods: Mapping[bytes, Served] = {
            method.wire: Served(name, f"{role}[{rank}].{name}", method.kind, getattr(instance, name))
            for name, method in interface.methods.items()
        } | {
            wire_name(name, Kind.ASYNC): Served(name, f"{role}[{rank}].{name}", Kind.ASYNC, function)
            for name, function in beside.items()
        }
        self.closing = False
        self.workers = Workers(f"{role}[{rank}]", threads)
        parts_at(endpoint).threads = self.workers.calls
        self.endpoint = endpoint
        self._port = protocol.port(uid)
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[tuple[object, int], Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = copy_context()
        actor = current.get()
        if actor is None or actor.endpoint is not endpoint:
            self._context.run(current.set, ActorContext(role, rank, gang, endpoint, self._loop))

    def start(self) -> None:
        """Take calls from now on, those that already wait included."""
        self.endpoint.serve(self._port, self._on_channel)

    async def aclose(self) -> None:
        """Take no more calls, cancel those that run, and wait until they have ended and their callers know.

        A method may take its time to end, or never do: bound this by a timeout. Where this is cancelled, the callers of
        what still runs get ActorClosed then. Idempotent.
        """
        self.closing = True
        self.endpoint.unserve(self._port)
        sessions = list(self._sessions.values())
        for session in sessions:
            for call in list(session.running.values()):
                call.end(Ending.CLOSING)
        try:
            # A call that somebody else's cancellation ended before its first step has not said that it ended.
            while running := [task for task in self._tasks if not task.done()]:
                await asyncio.wait(running)
            await self.workers.aclose()
        finally:
            for session in sessions:
                session.abandon()
                session.close()
            self._sessions.clear()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run part of a call as a task in a copy of the actor's context."""
        task = self._loop.create_task(work, name=name, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def start_call(self, call: Running) -> None:
        """Run a call likewise. It says itself when it ends: a callback of the task costs a microsecond."""
        call.task = task = self._loop.create_task(call.run(), name=call.where, context=self._context.copy())
        self._tasks.add(task)

    def ended(self, call: Running) -> None:
        """Take note that a call does nothing more."""
        if call.task is not None:
            self._tasks.discard(call.task)

    def _on_channel(self, channel: Channel) -> None:
        try:
            what, connection, number = protocol.OPENING.unpack(channel.payload)
        except struct.error:  # no caller of ours
            channel.close()
            return
        key = channel.link, connection
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(self, lambda: self._forget(key))
        session.attach(what, number, channel)

    def _forget(self, key: tuple[object, int]) -> None:
        self._sessions.pop(key, None)
