"""The same static round trips through Ray's Compiled Graphs, from their driver.

They are compiled for each row and torn down after it: while a graph exists, its actors wait on its channels and can
do nothing else. Their asyncio mode is slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
from ray.dag import InputNode, MultiOutputNode

from benchmarks.cluster import join
from benchmarks.side import time_row

if TYPE_CHECKING:
    from benchmarks.side import Turns

FAR = 3


@ray.remote(num_cpus=0.1)
class Echo:
    """Answers with what it got."""

    def echo(self, data: bytes) -> bytes:
        return data


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs."""
    actors: list[Any] = []

    def setup(address: str) -> None:
        join(address)
        actors.extend(Echo.remote() for _ in range(FAR))
        ray.get([actor.echo.remote(b"x") for actor in actors])

    def row(size: int, count: int) -> list[float]:
        with InputNode() as given:
            bound = [actor.echo.bind(given) for actor in actors[:size]]
            outcome = bound[0] if size == 1 else MultiOutputNode(bound)
        graph = outcome.experimental_compile()
        try:
            return time_row(lambda: ray.get(graph.execute(b"x")), count)
        finally:
            graph.teardown()

    turns.serve({"setup": setup, "driver": lambda count: row(1, count), "gather": lambda count: row(FAR, count)})
    ray.shutdown()
