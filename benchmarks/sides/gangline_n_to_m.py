"""Producers that send to consumers, in one group over both roles."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from actors import Actor
from benchmarks.sides.feeding import serve_feed

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

    async def eat(self, nbytes: int, rounds: int) -> int:
        feed = self.groups["feed"]
        producers = feed.ranks("producer")
        total = 0
        for _ in range(rounds):
            for share in await asyncio.gather(*(feed.recv(src) for src in producers)):
                total += int(share[0]) + share.nbytes
        return total


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""

    def expected(nbytes: int, producers: int, consumers: int) -> int:
        return producers * (nbytes + consumers)

    serve_feed(turns, Producer, Consumer, expected=expected)
