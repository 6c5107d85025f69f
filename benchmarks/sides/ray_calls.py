"""Calls between plain Ray actors, and from their driver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from benchmarks.cluster import join
from benchmarks.side import time_async_row, time_row

if TYPE_CHECKING:
    from benchmarks.side import Turns

FAR = 3


@ray.remote(num_cpus=0.1)
class Threaded:
    """Is called, in its main thread."""

    def echo(self, data: bytes) -> bytes:
        return data


@ray.remote(num_cpus=0.1)
class Async:
    """Is called, on its loop, and calls."""

    async def echo(self, data: bytes) -> bytes:
        return data

    async def size(self, array: np.ndarray) -> int:
        return array.nbytes

    async def echoes(self, callee: Any, count: int) -> list[float]:
        return await time_async_row(lambda: callee.echo.remote(b"x"), count)

    async def sizes(self, callee: Any, nbytes: int, count: int) -> list[float]:
        array = np.ones(nbytes, np.uint8)
        return await time_async_row(lambda: callee.size.remote(array), count)


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs."""
    threaded: list[Any] = []
    actors: list[Any] = []

    def setup(address: str) -> None:
        join(address)
        threaded.extend(Threaded.remote() for _ in range(FAR))
        actors.extend(Async.remote() for _ in range(2))
        ray.get([actor.echo.remote(b"x") for actor in (*threaded, *actors)])

    def actor(count: int) -> list[float]:
        return ray.get(actors[1].echoes.remote(actors[0], count))

    def driver(count: int) -> list[float]:
        return time_row(lambda: ray.get(actors[0].echo.remote(b"x")), count)

    def driver_threaded(count: int) -> list[float]:
        return time_row(lambda: ray.get(threaded[0].echo.remote(b"x")), count)

    def gather(count: int) -> list[float]:
        return time_row(lambda: ray.get([far.echo.remote(b"x") for far in threaded]), count)

    def array(nbytes: int, count: int) -> list[float]:
        return ray.get(actors[1].sizes.remote(actors[0], nbytes, count))

    turns.serve(
        {
            "setup": setup,
            "actor": actor,
            "driver": driver,
            "driver_threaded": driver_threaded,
            "gather": gather,
            "array": array,
        }
    )
    ray.shutdown()
