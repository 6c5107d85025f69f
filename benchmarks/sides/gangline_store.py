"""Tensors that go from the store of one actor to two others by reference."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from actors import Actor, Gang, Role
from benchmarks.side import time_row, warmth
from benchmarks.sides.gangs import serve_gang
from benchmarks.sides.hops import check
from scheduling import Resources

if TYPE_CHECKING:
    from actors import TensorRef
    from benchmarks.side import Turns


class Giver(Actor):
    """Puts the same array again and again."""

    def __init__(self) -> None:
        self.array = np.ones(0, np.uint8)

    async def prepare(self, nbytes: int) -> None:
        self.array = np.ones(nbytes, np.uint8)

    async def give(self) -> TensorRef:
        return await self.store.put(self.array)

    async def hops(self, takers: list[Any], count: int, made: bool) -> list[list[float]]:
        """Return the seconds in which each of a row of tensors reaches its readers, one after another.

        :param made: have each made in the store before, so that nothing is left to copy.
        """
        return [await self._hop(takers, made) for _ in range(warmth(count) + count)][-count:]

    async def _hop(self, takers: list[Any], made: bool) -> list[float]:
        array = self.array
        if made:
            array = self.store.empty(array.shape, array.dtype)
            array[:] = self.array
        samples = []
        start = time.perf_counter()
        ref = await self.store.put(array)
        for taker in takers:
            found = await taker.take(ref)
            samples.append(time.perf_counter() - start)
            check(found, array.nbytes)
            start = time.perf_counter()
        return samples

    async def puts(self, count: int) -> list[float]:
        """Return the seconds of each put. What it gave is let go of at once, and the next one reuses the memory."""
        samples = []
        for _ in range(warmth(count) + count):
            start = time.perf_counter()
            ref = await self.store.put(self.array)
            samples.append(time.perf_counter() - start)
            del ref
        return samples[-count:]

    async def copies(self, count: int) -> list[float]:
        """Return the seconds of each copy to the same memory."""
        target = np.ones_like(self.array)
        return time_row(lambda: np.copyto(target, self.array), count)


class Taker(Actor):
    """Looks at the end of a tensor."""

    async def take(self, ref: TensorRef) -> int:
        array = await ref
        return int(array[-1]) + array.nbytes


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    requests = {"first": first, "made": made, "further": further, "handed": handed, "put": put, "copy": copy}
    serve_gang(turns, make, requests)


def make() -> Gang:
    resources = Resources(cpu=0.1)
    return Gang(Role("giver", Giver, resources=resources), Role("taker", Taker, 2, resources=resources))


async def hops(gang: Gang, readers: int, nbytes: int, count: int, *, made: bool = False) -> list[float]:
    (giver,), takers = gang["giver"], gang["taker"]
    await giver.prepare(nbytes)
    return [samples[-1] for samples in await giver.hops(list(takers)[:readers], count, made)]


async def first(gang: Gang, nbytes: int, count: int) -> list[float]:
    return await hops(gang, 1, nbytes, count)


async def made(gang: Gang, nbytes: int, count: int) -> list[float]:
    return await hops(gang, 1, nbytes, count, made=True)


async def further(gang: Gang, nbytes: int, count: int) -> list[float]:
    return await hops(gang, 2, nbytes, count)


async def handed(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    return [await hand(gang, nbytes) for _ in range(warmth(count) + count)][-count:]


async def hand(gang: Gang, nbytes: int) -> float:
    start = time.perf_counter()
    ref = await gang["giver"][0].give()
    got = await gang["taker"][0].take(ref)
    end = time.perf_counter()
    check(got, nbytes)
    return end - start


async def put(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    samples: list[float] = await gang["giver"][0].puts(count)
    return samples


async def copy(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    samples: list[float] = await gang["giver"][0].copies(count)
    return samples
