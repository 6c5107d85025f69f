"""Processes that are killed: callers and actors, at any time."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from actor_harness import team

from actors import Actor
from collective.errors import PeerLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HERE = Path(__file__).parent


class Server(Actor):
    """Also what the other processes serve, which import this module for it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    async def pid(self) -> int:
        return os.getpid()

    async def wait(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def rows(self) -> AsyncIterator[int]:
        self.started.set()
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            self.ended.set()

    async def take(self, payload: bytes) -> int:
        return len(payload)

    async def echo(self, value: Any) -> Any:
        return value


@contextmanager
def process(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script in a process that finds the modules of this test, and kill it in the end."""
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    started = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        for pipe in (started.stdin, started.stdout):
            if pipe is not None:
                pipe.close()


SERVE = """
    import asyncio, os, pickle
    from actor_harness import team
    from test_call_deaths import Server

    async def main():
        async with team("unix", Server, 2) as servers:
            os.write(1, pickle.dumps(servers.handles))
            os.close(1)
            await asyncio.Event().wait()

    asyncio.run(main())
"""

CALL = """
    import asyncio, pickle, sys
    import numpy as np

    handle = pickle.load(sys.stdin.buffer)

    async def wait():
        await handle.wait()

    async def read():
        async with handle.rows() as rows:
            await anext(rows)
            await asyncio.Event().wait()

    async def send():
        await handle.echo(1)
        calls = [asyncio.create_task(handle.take(np.zeros(64 << 20, np.uint8))) for _ in range(4)]
        waiting = asyncio.create_task(handle.wait())
        await asyncio.gather(*calls, waiting)

    asyncio.run({what}())
"""


async def _load(server: subprocess.Popen[bytes]) -> Any:
    assert server.stdout is not None
    return pickle.loads(await asyncio.to_thread(server.stdout.read))


def test_calls_of_an_actor_that_is_killed_raise_at_once() -> None:
    async def main() -> None:
        with process(SERVE) as server:
            handles = await _load(server)
            assert await handles.pid() == [server.pid] * 2
            waiting = [asyncio.create_task(handles[rank].wait()) for rank in range(2)]
            sending = asyncio.create_task(handles[0].take(bytes(256 << 20)))
            async with handles[1].rows() as rows:
                await anext(rows)
                server.kill()
                async with asyncio.timeout(1):
                    for rank, call in enumerate(waiting):
                        with pytest.raises(PeerLost, match=rf"worker\[{rank}\] was lost during wait") as lost:
                            await call
                        assert (lost.value.role, lost.value.rank) == ("worker", rank)
                    with pytest.raises(PeerLost, match="during take"):
                        await sending
                    with pytest.raises(PeerLost, match="during rows"):
                        async for _ in rows:
                            pass
            # And so do later ones, also in a broadcast.
            async with asyncio.timeout(1):
                with pytest.raises(PeerLost, match=r"worker\[0\] was lost during echo"):
                    await handles[0].echo(1)
                with pytest.raises(ExceptionGroup, match=r"worker\.echo failed on ranks? 0") as caught:
                    await handles.echo(1)
                assert all(isinstance(error, PeerLost) for error in caught.value.exceptions)

    uvloop.run(main())


@pytest.mark.parametrize("what", ["wait", "read", "send"])
def test_calls_of_a_caller_that_is_killed_are_cancelled(what: str) -> None:
    async def main() -> None:
        async with team("unix", Server) as servers:
            actor = servers.instances[0]
            with process(CALL.replace("{what}", what)) as caller:
                assert caller.stdin is not None
                caller.stdin.write(pickle.dumps(servers[0]))
                caller.stdin.close()
                await actor.started.wait()
                assert not actor.ended.is_set()
                caller.kill()
                async with asyncio.timeout(2):
                    await actor.ended.wait()
            assert await servers[0].echo(1) == 1
            assert not any(session.running for session in servers.dispatchers[0]._sessions.values())

    uvloop.run(main())
