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

    async def hops(self, takers: list[Any], count: int) -> list[tuple[float, float]]:
        """Return the seconds in which each of a row of tensors reaches its first reader, and then the second."""
        return [await self._hop(takers) for _ in range(warmth(count) + count)][-count:]

    async def _hop(self, takers: list[Any]) -> tuple[float, float]:
        start = time.perf_counter()
        ref = await self.store.put(self.array)
        first = await takers[0].take(ref)
        middle = time.perf_counter()
        further = await takers[1].take(ref)
        end = time.perf_counter()
        check(first, further, self.array.nbytes)
        return middle - start, end - middle

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
    serve_gang(turns, make, {"first": first, "further": further, "handed": handed, "put": put, "copy": copy})


def make() -> Gang:
    resources = Resources(cpu=0.1)
    return Gang(Role("giver", Giver, resources=resources), Role("taker", Taker, 2, resources=resources))


async def hops(gang: Gang, nbytes: int, count: int) -> list[tuple[float, float]]:
    await gang["giver"][0].prepare(nbytes)
    samples: list[tuple[float, float]] = await gang["giver"][0].hops(list(gang["taker"]), count)
    return samples


async def first(gang: Gang, nbytes: int, count: int) -> list[float]:
    return [sample for sample, _ in await hops(gang, nbytes, count)]


async def further(gang: Gang, nbytes: int, count: int) -> list[float]:
    return [sample for _, sample in await hops(gang, nbytes, count)]


async def handed(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    return [await hand(gang, nbytes) for _ in range(warmth(count) + count)][-count:]


async def hand(gang: Gang, nbytes: int) -> float:
    start = time.perf_counter()
    ref = await gang["giver"][0].give()
    got = await gang["taker"][0].take(ref)
    end = time.perf_counter()
    check(got, got, nbytes)
    return end - start


async def put(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    samples: list[float] = await gang["giver"][0].puts(count)
    return samples


async def copy(gang: Gang, nbytes: int, count: int) -> list[float]:
    await gang["giver"][0].prepare(nbytes)
    samples: list[float] = await gang["giver"][0].copies(count)
    return samples
