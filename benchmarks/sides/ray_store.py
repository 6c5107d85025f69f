"""Arrays that go from one plain Ray actor to two others as Ray objects."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from benchmarks.cluster import join
from benchmarks.side import warmth
from benchmarks.sides.hops import check, ray_handed

if TYPE_CHECKING:
    from benchmarks.side import Turns


@ray.remote(num_cpus=0.1)
class Giver:
    """Puts the same array again and again, or returns it; Ray stores each."""

    def prepare(self, nbytes: int) -> None:
        self.array = np.ones(nbytes, np.uint8)

    def give(self) -> np.ndarray:
        return self.array

    def hops(self, takers: list[Any], count: int) -> list[tuple[float, float]]:
        """Return the seconds in which each of a row of arrays reaches its first reader, and then the second."""
        return [self._hop(takers) for _ in range(warmth(count) + count)][-count:]

    def _hop(self, takers: list[Any]) -> tuple[float, float]:
        start = time.perf_counter()
        ref = ray.put(self.array)
        first = ray.get(takers[0].take.remote(ref))
        middle = time.perf_counter()
        further = ray.get(takers[1].take.remote(ref))
        end = time.perf_counter()
        check(first, further, self.array.nbytes)
        return middle - start, end - middle


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

    def hops(place: int, nbytes: int, count: int) -> list[float]:
        giver, takers = actors
        ray.get(giver.prepare.remote(nbytes))
        return [sample[place] for sample in ray.get(giver.hops.remote(takers, count))]

    def handed(nbytes: int, count: int) -> list[float]:
        return [sample for sample, _ in ray_handed(*actors, nbytes, count)]

    turns.serve({"setup": setup, "first": partial(hops, 0), "further": partial(hops, 1), "handed": handed})
    ray.shutdown()
