"""Gangs on two nodes of a Ray cluster, which pretend to be two hosts."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from actors import Actor, Gang, Role
from collective import GroupSpec, PeerLost
from scheduling import Resources, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = 4 << 20
"""Elements of float32 that take several parts."""
ALL = GroupSpec("all", ("worker",), timeout=60.0)


class Worker(Actor):
    def __init__(self) -> None:
        self.rounds = 0

    async def where(self) -> tuple[str, int]:
        return os.environ["GANGLINE_HOST"], os.getpid()

    async def add(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Use the group, and its parts inside and across hosts; return what moved the data."""
        group = self.groups["all"]
        total = await group.allreduce(np.full(LARGE, self.rank + 1.0, np.float32))
        assert (total == 10).all()
        hosts = [member.address.host for member in group.members]
        inside = await group.split(sorted(set(hosts)).index(hosts[self.rank]))
        across = await group.split(hosts[: self.rank].count(hosts[self.rank]))
        for part in (inside, across):
            assert (await part.allreduce(np.ones(3))).tolist() == [2, 2, 2]
        return group.backends, [inside.backends, across.backends]

    async def lose(self) -> tuple[str, float]:
        """Reduce until somebody dies; return who, and when that was noticed."""
        array = np.ones(LARGE, np.float32)
        try:
            while True:
                await self.groups["all"].allreduce(array)
                self.rounds += 1
        except PeerLost as error:
            return f"{error.role}[{error.rank}]", time.monotonic()

    async def progress(self) -> int:
        return self.rounds

    async def answer(self, value: int) -> bool:
        """Add up what calls have that are under way at once, each member in another order."""
        group = self.groups["all"]
        for step in range(3):
            await asyncio.sleep(random.random() * 0.01)
            total = await group.allreduce(np.full(1 + value % 3, value + step))
            if (total != 4 * (value + step)).any():
                return False
        return True


@pytest.fixture
def two_nodes(private_ray: None) -> Iterator[None]:
    cluster = Cluster()
    try:
        for host in ("one", "two"):
            cluster.add_node(
                num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, env_vars={"GANGLINE_HOST": host}
            )
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("two_nodes")
def test_a_gang_on_two_hosts_takes_two_levels_and_misses_who_dies_in_the_middle() -> None:
    async def main() -> None:
        async with Gang(Role("worker", Worker, 4, resources=Resources()), groups=[ALL], placement=spread()) as gang:
            where = await gang["worker"].where()
            hosts = [host for host, _ in where]
            assert sorted(hosts) == ["one", "one", "two", "two"]
            calls = [gang["worker"].answer(100 * number) for number in range(50)]
            assert await asyncio.gather(*calls) == [[True] * 4] * 50
            assert await gang["worker"].add() == [(("shm", "gloo"), [("shm",), ("gloo",)])] * 4

            dead = next(rank for rank in range(4) if hosts[rank] != hosts[0])  # the leader of the second host
            losing = [asyncio.create_task(worker.lose()) for worker in gang["worker"]]
            while await gang["worker"][0].progress() < 3:
                pass
            os.kill(where[dead][1], signal.SIGKILL)
            killed = time.monotonic()
            with pytest.raises(PeerLost):
                await losing.pop(dead)
            for who, when in await asyncio.gather(*losing):
                assert who == f"worker[{dead}]"
                assert when - killed < 1.0

    asyncio.run(main())
