"""What starting and stopping a gang of 6 costs, against 6 plain Ray async actors in one placement group.

Both sides from nothing until every process is gone and the placement group removed; with a gloo group, the plain
actors import torch and form one ProcessGroupGloo. The sides take turns, each round in another order.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from typing import TYPE_CHECKING

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import Gang, Role
from benchmarks.cluster import ray_cluster
from benchmarks.report import Goal, Measure, Summary
from benchmarks.sides.idle_actor import Idle
from benchmarks.sides.plain_actor import PlainIdle
from collective import GroupSpec
from scheduling import Resources, pack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ACTORS = 6
CPU = 1.0
REPEAT = 7
GOAL = 1.3


async def gang(groups: tuple[GroupSpec, ...]) -> None:
    """Start and stop a gang."""
    role = Role("idle", Idle, ACTORS, resources=Resources(cpu=CPU))
    async with Gang(role, groups=groups, placement=pack()) as started:
        watch = Watch(await started["idle"].ready())
    watch.wait()


async def plain(gloo: bool) -> None:
    """Start and stop plain actors."""
    group = placement_group([{"CPU": CPU}] * ACTORS, strategy="PACK")
    await group.ready()
    plain_idle = ray.remote(num_cpus=CPU, max_restarts=0)(PlainIdle)
    actors = [
        plain_idle.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote()
        for rank in range(ACTORS)
    ]
    if gloo:
        port = free_port()
        await asyncio.gather(*(actor.form.remote(port, rank, ACTORS) for rank, actor in enumerate(actors)))
    watch = Watch(await asyncio.gather(*(actor.ready.remote() for actor in actors)))
    for actor in actors:
        ray.kill(actor)
    watch.wait()
    remove_placement_group(group)
    while placement_group_table(group)["state"] != "REMOVED":  # noqa: ASYNC110  Ray has no event for it
        await asyncio.sleep(0.001)


class Watch:
    """Sees processes end."""

    def __init__(self, pids: list[int]) -> None:
        self._open = []
        for pid in pids:
            try:
                self._open.append(os.pidfd_open(pid))
            except ProcessLookupError:  # gone already
                continue

    def wait(self) -> None:
        """Block until all have ended."""
        poll = select.poll()
        for fd in self._open:
            poll.register(fd, select.POLLIN)
        while self._open:
            for fd, _ in poll.poll():
                poll.unregister(fd)
                self._open.remove(fd)
                os.close(fd)


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def settle() -> None:
    """Wait until Ray has all of its CPUs back, so that no side pays for the one before."""
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:  # noqa: ASYNC110  as above
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)


async def timed(side: Callable[[], Awaitable[None]]) -> float:
    """Return the seconds that one side takes."""
    await settle()
    start = time.perf_counter()
    await side()
    return time.perf_counter() - start


def measure(repeat: int) -> list[Measure]:
    """Measure all sides in turns."""
    return asyncio.run(take_turns(repeat))


async def take_turns(repeat: int) -> list[Measure]:
    """Measure all sides in turns, on a Ray of its own."""
    gloo = (GroupSpec("all", roles=("idle",), backend="gloo"),)
    sides: dict[str, Callable[[], Awaitable[None]]] = {
        "gang": lambda: gang(()),
        "plain": lambda: plain(False),
        "gang, gloo": lambda: gang(gloo),
        "plain, gloo": lambda: plain(True),
    }
    with ray_cluster(ACTORS + 2):
        for side in sides.values():  # warm: Ray's own processes, the page cache
            await timed(side)
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(repeat):
            names = list(sides) if number % 2 else list(reversed(sides))
            for name in names:
                samples[name].append(await timed(sides[name]))
    titles = {f"start and stop {ACTORS} actors": "", "the same with a gloo group": ", gloo"}
    peers = {"": "Ray", ", gloo": "Ray, ProcessGroupGloo by hand"}
    return [
        Measure(
            what,
            "s",
            {
                "Gangline": Summary.of([[sample] for sample in samples[f"gang{suffix}"]]),
                peers[suffix]: Summary.of([[sample] for sample in samples[f"plain{suffix}"]]),
            },
            [Goal("Gangline", peers[suffix], GOAL)],
        )
        for what, suffix in titles.items()
    ]
