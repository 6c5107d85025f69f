"""Tensors that go from one plain Ray actor to two others over Ray Direct Transport, by gloo."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.experimental.collective import create_collective_group

from benchmarks.cluster import join
from benchmarks.sides.hops import ray_handed

if TYPE_CHECKING:
    from benchmarks.side import Turns


@ray.remote(num_cpus=0.1, enable_tensor_transport=True)
class Giver:
    """Returns the same tensor again and again; Ray keeps it here until it is wanted elsewhere."""

    def prepare(self, nbytes: int) -> None:
        self.tensor = torch.ones(nbytes, dtype=torch.uint8)

    @ray.method(tensor_transport="gloo")
    def give(self) -> torch.Tensor:
        return self.tensor


@ray.remote(num_cpus=0.1, enable_tensor_transport=True)
class Taker:
    """Looks at the end of a tensor."""

    def take(self, tensor: torch.Tensor) -> int:
        return int(tensor[-1]) + tensor.nbytes


def main(turns: Turns) -> None:
    """Start the actors in a Ray that runs, and a group of them."""
    actors: list[Any] = []

    def setup(address: str) -> None:
        join(address)
        giver, takers = Giver.remote(), [Taker.remote() for _ in range(2)]
        create_collective_group([giver, *takers], backend="gloo")
        actors.extend((giver, takers))

    def hops(readers: int, nbytes: int, count: int) -> list[float]:
        giver, takers = actors
        return [samples[-1] for samples in ray_handed(giver, takers[:readers], nbytes, count)]

    first, further = partial(hops, 1), partial(hops, 2)
    turns.serve({"setup": setup, "first": first, "further": further, "handed": first})
    ray.shutdown()
