"""Producers that put rows into a RowStream, and consumers that take batches from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from actors import Actor
from benchmarks.sides.feeding import serve_feed
from collective import Group, RowStream

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

    async def eat(self, nbytes: int, rounds: int) -> int:
        total = 0
        async with stream_of(self.groups["feed"], nbytes) as stream:
            async for batch in stream:
                total += int(batch["row"][0, 0]) + batch["row"].nbytes
        return total


def main(turns: Turns) -> None:
    """Start the gang in a Ray that runs."""

    def expected(nbytes: int, producers: int, consumers: int) -> int:
        return producers * nbytes + consumers

    serve_feed(turns, Producer, Consumer, expected=expected)
