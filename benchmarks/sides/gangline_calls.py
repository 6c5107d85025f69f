"""Calls between the actors of a gang on Ray, and from the process that started it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import uvloop

from actors import Actor, Gang, Role
from benchmarks.cluster import join
from benchmarks.side import time_async_row
from scheduling import Resources

if TYPE_CHECKING:
    from actors import Handle
    from benchmarks.side import Turns

FAR = 3


class Callee(Actor):
    """Is called."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def size(self, array: np.ndarray) -> int:
        return array.nbytes


class Caller(Actor):
    """Calls another actor."""

    async def echoes(self, callee: Handle[Callee], count: int) -> list[float]:
        return await time_async_row(lambda: callee.echo(b"x"), count)

    async def sizes(self, callee: Handle[Callee], nbytes: int, count: int) -> list[float]:
        array = np.ones(nbytes, np.uint8)
        return await time_async_row(lambda: callee.size(array), count)


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    gang: Any = None

    async def setup(address: str) -> None:
        nonlocal gang
        join(address)
        resources = Resources(cpu=0.1)
        roles = (Role("caller", Caller, 1, resources=resources), Role("callee", Callee, FAR, resources=resources))
        gang = await Gang(*roles).__aenter__()

    async def actor(count: int) -> list[float]:
        samples: list[float] = await gang["caller"][0].echoes(gang["callee"][0], count)
        return samples

    async def driver(count: int) -> list[float]:
        callee = gang["callee"][0]
        return await time_async_row(lambda: callee.echo(b"x"), count)

    async def gather(count: int) -> list[float]:
        callees = gang["callee"]
        return await time_async_row(lambda: callees.echo(b"x"), count)

    async def array(nbytes: int, count: int) -> list[float]:
        samples: list[float] = await gang["caller"][0].sizes(gang["callee"][0], nbytes, count)
        return samples

    await turns.serve_async({"setup": setup, "actor": actor, "driver": driver, "gather": gather, "array": array})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
