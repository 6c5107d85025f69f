"""Producers that send to consumers, in one group over both roles."""

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
from collective import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from benchmarks.side import Turns


class Producer(Actor):
    """Makes a share for each consumer in every round."""

    async def feed(self, nbytes: int, rounds: int) -> None:
        feed = self.groups["feed"]
        consumers = feed.ranks("consumer")
        for _ in range(rounds):
            shares = [np.ones(nbytes // len(consumers), np.uint8) for _ in consumers]
            await asyncio.gather(*(feed.send(share, dst) for share, dst in zip(shares, consumers, strict=True)))


class Consumer(Actor):
    """Takes its share of every producer in every round."""

    async def eat(self, rounds: int) -> int:
        feed = self.groups["feed"]
        producers = feed.ranks("producer")
        total = 0
        for _ in range(rounds):
            for share in await asyncio.gather(*(feed.recv(src) for src in producers)):
                total += int(share[0]) + share.nbytes
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
        _, totals = await asyncio.gather(gang["producer"].feed(nbytes, rounds), gang["consumer"].eat(rounds))
        took = time.perf_counter() - start
        check(sum(totals), nbytes, rounds)
        return took / rounds

    def check(total: int, nbytes: int, rounds: int) -> None:
        producers, consumers = len(gang["producer"]), len(gang["consumer"])
        if total != rounds * producers * (nbytes + consumers):
            raise AssertionError(f"the consumers counted {total} in {rounds} rounds of {nbytes} bytes a producer")

    async def feed(nbytes: int, rounds: int) -> list[float]:
        await run(nbytes, warmth(rounds))
        return [await run(nbytes, rounds)]

    await turns.serve_async({"setup": setup, "feed": feed})
    if gang is not None:
        await gang.aclose()
    ray.shutdown()
