"""What sides of Gangline have in common whose producers feed consumers round after round, in a gang."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from actors import Gang, Role
from benchmarks.side import warmth
from benchmarks.sides.gangs import serve_gang
from collective import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors import Actor
    from benchmarks.side import Turns


def serve_feed(
    turns: Turns, producer: type[Actor], consumer: type[Actor], *, expected: Callable[[int, int, int], int]
) -> None:
    """Serve a side whose producers `feed(nbytes, rounds)`, while its consumers `eat(nbytes, rounds)` and count.

    :param expected: what the consumers count in a round, by the bytes of a producer and how many there are of both.
    """

    def make(producers: int, consumers: int) -> Gang:
        resources = Resources(cpu=0.1)
        return Gang(
            Role("producer", producer, producers, resources=resources),
            Role("consumer", consumer, consumers, resources=resources),
            groups=[GroupSpec("feed", roles=("producer", "consumer"))],
        )

    async def run(gang: Gang, nbytes: int, rounds: int) -> float:
        start = time.perf_counter()
        _, totals = await asyncio.gather(gang["producer"].feed(nbytes, rounds), gang["consumer"].eat(nbytes, rounds))
        took = time.perf_counter() - start
        if sum(totals) != rounds * expected(nbytes, len(gang["producer"]), len(gang["consumer"])):
            raise AssertionError(f"the consumers counted {totals} in {rounds} rounds of {nbytes} bytes a producer")
        return took / rounds

    async def feed(gang: Gang, nbytes: int, rounds: int) -> list[float]:
        await run(gang, nbytes, warmth(rounds))
        return [await run(gang, nbytes, rounds)]

    serve_gang(turns, make, {"feed": feed})
