"""The runtime `inproc`: every actor is a few tasks of this process, with an endpoint of its own.

For unit tests, for debugging under pdb, and for simulations of many ranks. Nothing is reserved, and a method that
blocks the loop blocks the whole gang.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from actors._host import CLOSE_SECONDS, Host
from actors._pickling import dumps, loads
from actors.abc import Process, Runtime
from collective.errors import LinkError
from collective.links import open_endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors._host import Blueprint
    from actors.abc import Launch, ProcessId
    from actors.role import Role
    from collective.abc import Endpoint


_AT_ONCE = 100
"""Hosts that connect at the same time; an endpoint drops dialers where there are many more."""
_KILL_SECONDS = 1.0
"""What hosts that were killed are given to end. Code that refuses to be cancelled cannot be ended here."""


class InprocRuntime(Runtime):
    """Actors as tasks of the loop that `launch` runs on."""

    name: ClassVar[str] = "inproc"

    def __init__(self, *, roles: Sequence[Role[Any]]) -> None:
        self._roles = {role.name: role for role in roles}
        self._pickles = {role.name: _take_apart(role) for role in roles}
        self._unmade = {role.name: role.count for role in roles}
        self._endpoint: Endpoint | None = None
        self._processes: list[_Tasks] = []

    async def open(self, *, start_timeout: float) -> Endpoint:
        self._endpoint = await open_endpoint(kinds=("memory",))
        return self._endpoint

    async def launch(self, launches: Sequence[Launch]) -> Sequence[Process]:
        for first in range(0, len(launches), _AT_ONCE):
            await asyncio.gather(*map(self._launch, launches[first : first + _AT_ONCE]))
        return self._processes

    async def aclose(self) -> None:
        if tasks := [process.task for process in self._processes]:
            # Those that were asked to leave are about to end.
            if leaving := [process.task for process in self._processes if process.host.leaving]:
                await asyncio.wait(leaving, timeout=CLOSE_SECONDS)
            for process in self._processes:
                await process.kill()
            await asyncio.wait(tasks, timeout=_KILL_SECONDS)
        self._processes = []
        if self._endpoint is not None:
            await self._endpoint.aclose()

    async def _launch(self, launch: Launch) -> None:
        endpoint = await open_endpoint(kinds=("memory",))
        host = Host(launch, endpoint, partial(self._blueprint, launch.role))
        # The order of the launches holds: nothing above waits.
        self._processes.append(_Tasks(host, endpoint))
        with contextlib.suppress(LinkError):  # the host meets it again, and tells
            await endpoint.connect(launch.home, launch.member)

    def _blueprint(self, role: str) -> Blueprint:
        # The class goes as it is, so that callers and actors agree on what it is; the arguments are copies, as
        # between processes.
        data, buffers = self._pickles[role]
        self._unmade[role] -= 1
        if not self._unmade[role]:
            del self._pickles[role]
        args, kwargs = loads(data, [memoryview(bytearray(buffer)) for buffer in buffers], f"an argument of {role}")
        return self._roles[role].cls, args, kwargs


class _Tasks(Process):
    """What stands for a process: the host's task and all that it started."""

    native = None

    def __init__(self, host: Host, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        self.ended = loop.create_future()
        self.task = loop.create_task(host.serve(), name=f"{host.launch} host")
        self.task.add_done_callback(self._on_end)
        self.host = host
        self._endpoint = endpoint
        self._killed = False

    def identify(self, process: ProcessId) -> None:
        """It is this very process: nothing to watch."""

    async def kill(self) -> None:
        if not self._killed and not self.task.done():
            self._killed = True
            self._endpoint.abort()
            self.task.cancel()

    def _on_end(self, task: asyncio.Task[bool]) -> None:
        error = None if task.cancelled() else task.exception()
        if not isinstance(error, Exception):
            error = ConnectionError("its tasks were killed" if self._killed else "its tasks have ended")
        self.ended.set_result(error)


def _take_apart(role: Role[Any]) -> tuple[bytes, list[bytes]]:
    arguments = tuple(role.args), dict(role.kwargs)
    data, buffers = dumps(arguments, f"an argument of {role.cls.__qualname__}", in_call=False)
    return data, [bytes(buffer) for buffer in buffers]
