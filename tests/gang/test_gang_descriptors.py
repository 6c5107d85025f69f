"""What a further actor costs in descriptors, and what happens where there are none left."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gang_harness import run

from actors import Actor, Gang, Role
from collective.types import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from collective.store import TensorRef

pytestmark = pytest.mark.usefixtures("ray_session")

LARGE = 1 << 20
AT_THE_DRIVER, IN_A_GROUP = 8, 6
"""Descriptors that each further actor may cost the driver, and each further member another member."""
FEW, MANY = 2, 4


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Member(Actor):
    async def descriptors(self) -> int:
        return descriptors()

    async def put(self) -> TensorRef:
        return await self.store.put(np.ones(LARGE, np.uint8))

    async def take(self, array: np.ndarray) -> np.ndarray:
        return array

    async def meet(self) -> None:
        """Have to do with every other member: collectives, and messages, of large arrays as well."""
        group = self.groups["all"]
        others = [rank for rank in range(group.size) if rank != group.rank]
        for nbytes in (8, LARGE):
            data = np.ones(nbytes, np.uint8)
            await group.allreduce(data)
            await group.allgather(data)
            sends = [group.send(data, rank) for rank in others]
            await asyncio.gather(*(group.recv(rank) for rank in others))
            await asyncio.gather(*sends)

    async def call_others(self) -> None:
        others = [rank for rank in range(self.groups["all"].size) if rank != self.rank]
        await asyncio.gather(*(self.gang["member"][rank].take(np.ones(LARGE, np.uint8)) for rank in others))


async def used(size: int, backend: str, *, calls: bool) -> tuple[int, list[int]]:
    """Return how many descriptors the driver and the first members have, once all have had to do with each other."""
    role = Role("member", Member, size, resources=Resources(cpu=0.1))
    async with Gang(role, groups=[GroupSpec("all", roles=("member",), backend=backend)]) as gang:
        refs = await gang["member"].put()
        await asyncio.gather(*refs)
        await gang["member"].meet()
        if calls:
            await gang["member"].call_others()
        await gang["member"].take(np.ones(LARGE, np.uint8))
        return descriptors(), (await gang["member"].descriptors())[:FEW]


@pytest.mark.parametrize(("backend", "calls"), [("shm", True), ("gloo", False)])
def test_a_further_actor_costs_few_descriptors(backend: str, calls: bool) -> None:
    async def main() -> None:
        await used(FEW, backend, calls=calls)  # what Ray and this process open once
        driver, members = await used(FEW, backend, calls=calls)
        driver_then, members_then = await used(MANY, backend, calls=calls)
        assert driver_then - driver <= AT_THE_DRIVER * (MANY - FEW)
        for before, after in zip(members, members_then, strict=True):
            assert after - before <= IN_A_GROUP * (MANY - FEW)

    run(main())
