"""The answering side: an actor's port, where calls arrive."""

from __future__ import annotations

import asyncio
import struct
import time
from contextvars import copy_context
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from actors import _protocol as protocol
from actors import _waits
from actors._context import ActorContext, current
from actors._interface import Interface, Kind, wire_name
from actors._running import Ending, Running, Served
from actors._session import Session
from actors._threads import Workers
from actors.errors import CallDeadlock
from collective.scopes import parts_at

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from actors.actor import Actor
    from collective.abc import Channel, Endpoint


_PATIENCE: Final = 0.1
"""Seconds that a call waits for its turn before its actor looks for a circle of calls, and between such looks."""


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
        self.role = role
        self.rank = rank
        self._instance = instance
        self._beside = {
            wire_name(name, Kind.ASYNC): Served(name, f"{role}[{rank}].{name}", Kind.ASYNC, function)
            for name, function in beside.items()
        }
        self.methods = self._bind()
        self.closing = False
        self.workers = Workers(f"{role}[{rank}]", threads)
        parts_at(endpoint).threads = self.workers.calls
        self.endpoint = endpoint
        self._port = protocol.port(uid)
        self._uid = uid
        self._setup: asyncio.Task[Any] | None = None
        self._held: dict[Running, int] = {}
        self._watching: asyncio.TimerHandle | None = None
        self._questions: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[tuple[object, int], Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = copy_context()
        actor = current.get()
        if actor is None or actor.endpoint is not endpoint:
            self._context.run(current.set, ActorContext(role, rank, gang, endpoint, self._loop))

    def start(self, *, setup: asyncio.Task[Any] | None = None) -> None:
        """Take calls from now on, those that already wait included.

        :param setup: the actor is still in its `setup`, which is part of this task: its calls wait for `open`, but for
            those that `setup` itself waits for.
        """
        self._setup = setup
        self.endpoint.serve(self._port, self._on_channel)

    def open(self) -> None:
        """Run calls from now on, in the order in which they came and in this context: `setup` has ended."""
        self._setup = None
        self._context = copy_context()
        self.methods = self._bind()  # it may have replaced some
        for call in list(self._held):
            self.release(call)

    def _bind(self) -> dict[bytes, Served]:
        return {
            method.wire: Served(
                name, f"{self.role}[{self.rank}].{name}", method.kind, getattr(self._instance, name), method.wire
            )
            for name, method in Interface.of(type(self._instance)).methods.items()
        } | self._beside

    async def aclose(self) -> None:
        """Take no more calls, cancel those that run, and wait until they have ended and their callers know.

        A method may take its time to end, or never do: bound this by a timeout. Where this is cancelled, the callers of
        what still runs get ActorClosed then. Idempotent.
        """
        self.closing = True
        self.endpoint.unserve(self._port)
        for question in self._questions:
            question.cancel()
        if self._watching is not None:
            self._watching.cancel()
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
        """Run a call likewise, once the actor is set up."""
        if self._setup is not None and call.method.wire is not None:
            self._held[call] = time.time_ns()
            self.watch()
        else:
            self._run(call)

    def release(self, call: Running) -> None:
        """Run a call that waits for `setup`, though that may not have ended."""
        if self._held.pop(call, None) is not None:
            if call.method.wire is not None:
                call.method = self.methods.get(call.method.wire, call.method)
            self._run(call)

    def _run(self, call: Running) -> None:
        # It says itself when it ends: a callback of the task costs a microsecond.
        call.task = task = self._loop.create_task(call.run(), name=call.where, context=self._context.copy())
        self._tasks.add(task)

    def ended(self, call: Running) -> None:
        """Take note that a call does nothing more."""
        if call.task is not None:
            self._tasks.discard(call.task)

    # Calls that wait for each other in a circle, as `actors._waits` has it.

    def watch(self) -> None:
        """Look for circles after a while: a call waits for its turn."""
        if self._watching is None and not self.closing:
            self._watching = self._loop.call_later(_PATIENCE, self._look)

    def _look(self) -> None:
        self._watching = None
        holders = self.workers.holders()
        in_line = [call for call in self._calls() if call.job is not None and not call.job.started]
        # A thread that is at work waits for nobody.
        if self._held or (in_line and holders and all(job.waits_for is not None for job in holders)):
            self.question(self._open_circles())
        elif in_line:
            self.watch()

    def question(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what asks other actors; nobody waits for it where this one closes."""
        if self.closing:
            work.close()
            return
        task = self.spawn(work, name=f"{self.role}[{self.rank}] looks for circles of calls")
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    async def _open_circles(self) -> None:
        for in_setup in (True, False):
            circle = await self._circle_through([_waits.Held(self._place(in_setup))], in_setup)
            if circle and (opens := _waits.youngest(circle)).place == self._place(opens.in_setup):
                self._give_way(opens, circle)
        self.watch()

    def _give_way(self, opens: _waits.Held, circle: list[_waits.Held]) -> None:
        for call in [*self._held, *self._calls()]:
            if id(call) != opens.key:
                continue
            if opens.in_setup:
                self.release(call)
            elif call.job is not None and not call.job.started:
                call.job.refuse(CallDeadlock(call.where, _waits.describe(circle)))
            return

    async def circle_of(self, call: Running, way: list[_waits.Held]) -> list[_waits.Held]:
        """Return the calls of a circle that a call is in; none where it is in none.

        :param way: the calls that wait for it.
        """
        job = call.job
        in_setup = call in self._held
        if in_setup or (job is not None and not job.started):
            place = self._place(in_setup)
            since = self._held[call] if in_setup or job is None else job.since
            behind = () if in_setup else tuple(f"{each.where}()" for each in self._calls() if _holds(each))
            held = _waits.Held(place, in_setup, since, id(call), call.where, f"{self.role}[{self.rank}]", behind)
            for index, each in enumerate(way):
                if each.place == place:
                    return [held, *way[index + 1 :]]
            return await self._circle_through([*way, held], in_setup)
        task = call.task if job is None else job.waits_for
        return await _waits.circle_through([task], self.endpoint, way) if task is not None else []

    async def _circle_through(self, way: list[_waits.Held], in_setup: bool) -> list[_waits.Held]:
        """Return the calls of the circles that lead through what holds this actor's setup, or its threads."""
        if in_setup:
            tasks = [self._setup] if self._setup is not None else []
        else:
            tasks = [job.waits_for for job in self.workers.holders() if job.waits_for is not None]
            if len(tasks) < len(self.workers.holders()):
                return []
        return await _waits.circle_through(tasks, self.endpoint, way)

    def _place(self, in_setup: bool) -> str:
        return f"{'setup' if in_setup else 'threads'} of {self._uid}"

    def _calls(self) -> list[Running]:
        return [call for session in self._sessions.values() for call in session.running.values()]

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


def _holds(call: Running) -> bool:
    return call.job is not None and call.job.started
