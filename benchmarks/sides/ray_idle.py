"""Plain Ray async actors that do nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray

from benchmarks.cluster import join
from benchmarks.sides.plain_actor import PlainIdle

if TYPE_CHECKING:
    from benchmarks.side import Turns


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs."""
    idle: list[Any] = []

    def setup(address: str, actors: int) -> None:
        join(address)
        plain = ray.remote(num_cpus=0.1)(PlainIdle)
        idle.extend(plain.remote() for _ in range(actors))

    def processes() -> list[int]:
        return [os.getpid(), *ray.get([actor.ready.remote() for actor in idle])]

    turns.serve({"setup": setup, "processes": processes})
    ray.shutdown()
