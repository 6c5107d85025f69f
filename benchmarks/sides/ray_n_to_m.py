"""Producers whose results go to consumers as Ray objects."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from benchmarks.cluster import join
from benchmarks.side import warmth

if TYPE_CHECKING:
    from benchmarks.side import Turns

AHEAD = 4
"""Rounds that are under way at once."""


@ray.remote(num_cpus=0.1)
class Producer:
    """Makes a share for each consumer."""

    def make(self, nbytes: int, consumers: int) -> tuple[np.ndarray, ...]:
        return tuple(np.ones(nbytes // consumers, np.uint8) for _ in range(consumers))


@ray.remote(num_cpus=0.1)
class Consumer:
    """Takes its share of every producer."""

    def eat(self, *shares: np.ndarray) -> int:
        return sum(int(share[0]) + share.nbytes for share in shares)


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs."""
    producers: list[Any] = []
    consumers: list[Any] = []

    def setup(address: str, many: int, few: int) -> None:
        join(address)
        producers.extend(Producer.remote() for _ in range(many))
        consumers.extend(Consumer.remote() for _ in range(few))

    def start_round(nbytes: int) -> list[Any]:
        size = len(consumers)
        shares = [producer.make.options(num_returns=size).remote(nbytes, size) for producer in producers]
        return [consumer.eat.remote(*(share[rank] for share in shares)) for rank, consumer in enumerate(consumers)]

    def run(nbytes: int, rounds: int) -> float:
        total = 0
        under_way: deque[list[Any]] = deque()
        start = time.perf_counter()
        for _ in range(rounds):
            under_way.append(start_round(nbytes))
            if len(under_way) > AHEAD:
                total += sum(ray.get(under_way.popleft()))
        total += sum(sum(ray.get(left)) for left in under_way)
        took = time.perf_counter() - start
        if total != rounds * len(producers) * (nbytes + len(consumers)):
            raise AssertionError(f"the consumers counted {total} in {rounds} rounds of {nbytes} bytes a producer")
        return took / rounds

    def feed(nbytes: int, rounds: int) -> list[float]:
        run(nbytes, warmth(rounds))
        return [run(nbytes, rounds)]

    turns.serve({"setup": setup, "feed": feed})
    ray.shutdown()
