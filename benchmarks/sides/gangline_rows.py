"""Producers that put rows into a RowStream, and consumers that take batches from it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import uvloop

from actors import Actor, Gang, Role
from benchmarks.cluster import join
from benchmarks.side import warmth
from collective import Group, GroupSpec, RowStream
from scheduling import Resources

if TYPE_CHECKING:
    from benchmarks.side import Turns

WIDTH = 1024


def stream_of(group: Group, nbytes: int) -> RowStream:
    """Make a stream of which a round takes a block of each producer."""
    producers, consumers = len(group.ranks("producer")), len(group.ranks("consumer"))
    batch_size = nbytes // WIDTH * producers // consumers
    return RowStream(group, producers="producer", consumers="consumer", batch_size=batch_size, tail="error")


class Producer(Actor):
    """Makes a block in every round."""

    async def feed(self, nbytes: int, rounds: int) -> None:
        async with stream_of(self.groups["feed"], nbytes) as stream:
            for _ in range(rounds):
                await stream.put({"row": np.ones((nbytes // WIDTH, WIDTH), np.uint8)})


class Consumer(Actor):
    """Takes a batch in every round."""

    async def eat(self, nbytes: int) -> int:
        total = 0
        async with stream_of(self.groups["feed"], nbytes) as stream:
            async for batch in stream:
                total += int(batch["row"][0, 0]) + batch["row"].nbytes
        return total


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    gang: Any = None

    async def setup(address: str, producers: int, consumers: int) -> None:
        nonlocal gang
        join(address)
        resources = Resources(cpu=0.1)
        gang = await Gang(
            Role("producer", Producer, producers, resources=resources),
            Role("consumer", Consumer, consumers, resources=resources),
            groups=[GroupSpec("feed", roles=("producer", "consumer"))],
        ).__aenter__()

    async def run(nbytes: int, rounds: int) -> float:
        start = time.perf_counter()
        _, totals = await asyncio.gather(gang["producer"].feed(nbytes, rounds), gang["consumer"].eat(nbytes))
        took = time.perf_counter() - start
        if sum(totals) != rounds * (len(gang["producer"]) * nbytes + len(gang["consumer"])):
            raise AssertionError(f"the consumers counted {totals} in {rounds} rounds of {nbytes} bytes a producer")
        return took / rounds

    async def feed(nbytes: int, rounds: int) -> list[float]:
        await run(nbytes, warmth(rounds))
        return [await run(nbytes, rounds)]

    await turns.serve_async({"setup": setup, "feed": feed})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
