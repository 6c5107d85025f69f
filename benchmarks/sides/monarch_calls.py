"""Calls between Monarch's actors, and from the process that started them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from monarch.actor import Actor, endpoint, shutdown_context, this_host

from benchmarks.side import time_async_row

if TYPE_CHECKING:
    from benchmarks.side import Turns

FAR = 3


class Callee(Actor):
    """Is called."""

    @endpoint
    async def echo(self, data: bytes) -> bytes:
        return data


class Caller(Actor):
    """Calls another actor."""

    def __init__(self, callee: Any) -> None:
        self.callee = callee

    @endpoint
    async def echoes(self, count: int) -> list[float]:
        return await time_async_row(lambda: self.callee.echo.call_one(b"x"), count)


def main(turns: Turns) -> None:
    """Start a process for each actor."""
    asyncio.run(serve(turns))


async def serve(turns: Turns) -> None:
    callee = this_host().spawn_procs({"gpus": 1}).spawn("callee", Callee)
    caller = this_host().spawn_procs({"gpus": 1}).spawn("caller", Caller, callee)
    callees = this_host().spawn_procs({"gpus": FAR}).spawn("callees", Callee)

    async def setup() -> None:
        await caller.echoes.call_one(1)
        await callees.echo.call(b"x")

    async def actor(count: int) -> list[float]:
        samples: list[float] = await caller.echoes.call_one(count)
        return samples

    async def driver(count: int) -> list[float]:
        return await time_async_row(lambda: callee.echo.call_one(b"x"), count)

    async def gather(count: int) -> list[float]:
        return await time_async_row(lambda: callees.echo.call(b"x"), count)

    await turns.serve_async({"setup": setup, "actor": actor, "driver": driver, "gather": gather})
    await shutdown_context()
