"""Actors that all call one another at the same time, over links of a kind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
import uvloop

from actors import Actor, Gang, Role
from benchmarks.cluster import join
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.side import Turns


class Neighbour(Actor):
    """Calls the next of its role, and is called by the one before."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def call_next(self, count: int) -> float:
        """Return the seconds that each call took."""
        everyone = self.gang["neighbour"]
        following = everyone[(self.rank + 1) % len(everyone)]
        start = time.perf_counter()
        for _ in range(count):
            await following.echo(b"x")
        return (time.perf_counter() - start) / count


def only_unix() -> Callable[[], None]:
    """Return what has the actors of a process listen on unix sockets instead of shared memory.

    A function within one, which goes by value: Ray runs it before this module can be imported there.
    """

    def hook() -> None:
        from actors._runtimes import _ray_host

        _ray_host.KINDS = ("unix",)

    return hook


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    gang: Any = None

    async def setup(address: str, kind: str, actors: int) -> None:
        nonlocal gang
        environment = {"worker_process_setup_hook": only_unix()} if kind == "unix" else None
        join(address, runtime_env=environment)
        gang = await Gang(Role("neighbour", Neighbour, actors, resources=Resources(cpu=0.1))).__aenter__()
        await gang["neighbour"].call_next(10)

    async def ring(count: int) -> list[float]:
        samples: list[float] = await gang["neighbour"].call_next(count)
        return samples

    await turns.serve_async({"setup": setup, "ring": ring})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
