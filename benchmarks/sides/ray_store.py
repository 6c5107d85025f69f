"""Arrays that go from one plain Ray actor to two others as Ray objects."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from benchmarks.cluster import join
from benchmarks.sides.hops import ray_first, ray_further

if TYPE_CHECKING:
    from benchmarks.side import Turns


@ray.remote(num_cpus=0.1)
class Giver:
    """Returns the same array again and again; Ray stores each."""

    def prepare(self, nbytes: int) -> None:
        self.array = np.ones(nbytes, np.uint8)

    def give(self) -> np.ndarray:
        return self.array


@ray.remote(num_cpus=0.1)
class Taker:
    """Looks at the end of an array."""

    def take(self, array: np.ndarray) -> int:
        return int(array[-1]) + array.nbytes


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs."""
    actors: list[Any] = []

    def setup(address: str) -> None:
        join(address)
        actors.extend((Giver.remote(), [Taker.remote() for _ in range(2)]))

    def hops(row: Any, nbytes: int, count: int) -> list[float]:
        giver, takers = actors
        return row(giver, takers, nbytes, count)

    turns.serve({"setup": setup, "first": partial(hops, ray_first), "further": partial(hops, ray_further)})
    ray.shutdown()
