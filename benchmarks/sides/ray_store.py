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

    def hops(self, takers: list[Any], count: int) -> list[list[float]]:
        """Return the seconds in which each of a row of arrays reaches its readers, one after another."""
        return [self._hop(takers) for _ in range(warmth(count) + count)][-count:]

    def _hop(self, takers: list[Any]) -> list[float]:
        samples = []
        start = time.perf_counter()
        ref = ray.put(self.array)
        for taker in takers:
            found = ray.get(taker.take.remote(ref))
            samples.append(time.perf_counter() - start)
            check(found, self.array.nbytes)
            start = time.perf_counter()
        return samples


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

    def hops(readers: int, nbytes: int, count: int) -> list[float]:
        giver, takers = actors
        ray.get(giver.prepare.remote(nbytes))
        return [samples[-1] for samples in ray.get(giver.hops.remote(takers[:readers], count))]

    def handed(nbytes: int, count: int) -> list[float]:
        giver, takers = actors
        return [sample for (sample,) in ray_handed(giver, takers[:1], nbytes, count)]

    turns.serve({"setup": setup, "first": partial(hops, 1), "further": partial(hops, 2), "handed": handed})
    ray.shutdown()
