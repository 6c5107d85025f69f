"""Calls between xoscar's actors, and from the process that started them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop
import xoscar

from benchmarks.side import time_async_row

if TYPE_CHECKING:
    from benchmarks.side import Turns


class Callee(xoscar.Actor):
    """Is called."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def size(self, array: np.ndarray) -> int:
        return array.nbytes


class Caller(xoscar.Actor):
    """Calls another actor."""

    def __init__(self, callee: Any) -> None:
        self.callee = callee

    async def echoes(self, count: int) -> list[float]:
        return await time_async_row(lambda: self.callee.echo(b"x"), count)

    async def sizes(self, nbytes: int, count: int) -> list[float]:
        array = np.ones(nbytes, np.uint8)
        return await time_async_row(lambda: self.callee.size(array), count)


def main(turns: Turns) -> None:
    """Start a pool of two processes beside this one."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with await xoscar.create_actor_pool(address, n_process=2):
        callee = await create(address, 1, Callee)
        caller = await create(address, 2, Caller, callee)

        async def setup() -> None: ...

        async def driver(count: int) -> list[float]:
            return await time_async_row(lambda: callee.echo(b"x"), count)

        await turns.serve_async({"setup": setup, "actor": caller.echoes, "driver": driver, "array": caller.sizes})


async def create(address: str, process: int, *arguments: Any) -> Any:
    """Create an actor in a process of the pool."""
    strategy = xoscar.allocate_strategy.ProcessIndex(process)
    return await xoscar.create_actor(*arguments, address=address, uid=str(process), allocate_strategy=strategy)


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
