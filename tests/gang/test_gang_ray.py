"""Gangs among other users of Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest
import ray
from gang_harness import actor_processes, live_placement_groups, run

from actors import Actor, Gang, Handle, NotReady, Role
from scheduling import Resources

SMALL = Resources(cpu=0.5)

# Ray's own tasks and actors cannot import this module where they run; the actors of gangs can.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_session")


class Worker(Actor):
    async def pid(self) -> int:
        return os.getpid()

    async def add(self, a: int, b: int) -> int:
        return a + b

    async def pid_of(self, handle: Handle[Worker]) -> int:
        return await handle.pid()

    async def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=0)
def task(handle: Handle[Worker], times: int) -> list[int]:
    """Use a handle from loops that come and go."""
    return [asyncio.run(handle.add(number, 1)) for number in range(times)]


@ray.remote(num_cpus=0)
class Plain:
    def __init__(self, handle: Handle[Worker]) -> None:
        self.handle = handle

    def ask(self) -> list[int]:
        return [asyncio.run(self.handle.pid()) for _ in range(2)]


@ray.remote(num_cpus=0)
class PlainAsync:
    async def ask(self, handle: Handle[Worker]) -> int:
        return await handle.pid()

    async def ray_actor(self, handle: Handle[Worker]) -> str:
        return handle.ray_actor._actor_id.hex()

    async def start(self) -> tuple[list[int], list[int]]:
        """Start a gang, and tell who its actors were."""
        async with Gang(Role("worker", Worker, 2, resources=SMALL)) as gang:
            pids = await gang["worker"].pid()
            assert await gang["worker"][0].pid_of(gang["worker"][1]) == pids[1]
        return pids, [pid for pid in pids if psutil.pid_exists(pid)]


def worker(count: int = 2) -> Role[Worker]:
    return Role("worker", Worker, count, resources=SMALL)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_handles_work_in_plain_tasks_and_actors(loop):
    async def main():
        async with Gang(worker()) as gang:
            one, two = gang["worker"]
            pids = await gang["worker"].pid()
            plain, plain_async = Plain.remote(one), PlainAsync.remote()
            found = await asyncio.gather(task.remote(one, 3), plain.ask.remote(), plain_async.ask.remote(two))
            assert found == [[1, 2, 3], [pids[0]] * 2, pids[1]]
            again = ray.put(two)
            assert await plain_async.ask.remote(again) == pids[1]
            # One holds on to the other's handle, in another process.
            assert await one.pid_of(two) == pids[1]
            ids = {handle.ray_actor._actor_id.hex() for handle in gang["worker"]}
            assert len(ids) == 2
            assert await plain_async.ray_actor.remote(two) in ids
            for actor in (plain, plain_async):
                await asyncio.to_thread(ray.kill, actor)

    run(main(), loop=loop)


def test_an_inproc_actor_is_no_ray_actor():
    async def main():
        async with Gang(worker(), runtime="inproc") as gang:
            with pytest.raises(NotReady, match="no Ray actor"):
                _ = gang["worker"][0].ray_actor

    run(main())


def test_a_ray_actor_starts_a_gang():
    async def main():
        starter = PlainAsync.remote()
        pids, left = await starter.start.remote()
        assert len(pids) == 2
        assert left == []
        await asyncio.to_thread(ray.kill, starter)

    run(main())


class Nesting(Actor):
    async def nest(self, runtime: str, guest: Handle[Worker]) -> list[int]:
        async with Gang(worker(), runtime=runtime) as gang:
            own = await gang["worker"].pid()
            assert await gang["worker"][0].pid_of(guest) == await guest.pid()
        return own


@pytest.mark.parametrize("runtime", ["inproc", "ray"])
def test_an_actor_starts_a_gang_of_its_own(runtime):
    async def main():
        async with Gang(Role("nesting", Nesting, 1, resources=SMALL), worker(1)) as gang:
            pids = await gang["nesting"][0].nest(runtime, gang["worker"][0])
            assert len(set(pids)) == {"inproc": 1, "ray": 2}[runtime]

    run(main())


def test_several_gangs_at_once():
    async def main():
        async def one(number: int) -> list[int]:
            async with Gang(worker(), name="same") as gang:
                assert await gang["worker"].add(number, 1) == [number + 1] * 2
                return await gang["worker"].pid()

        found = await asyncio.gather(*map(one, range(4)))
        assert len({pid for pids in found for pid in pids}) == 8

    run(main())


def test_actors_are_placed_where_their_resources_are_reserved():
    async def main():
        async with Gang(worker(4)) as gang:
            assert set(await gang["worker"].node()) == {ray.get_runtime_context().get_node_id()}
            left = ray.available_resources()["CPU"]
            assert left == ray.cluster_resources()["CPU"] - 4 * SMALL.cpu

    run(main())


def test_what_ray_shows_for_an_actor_is_its_place_in_the_gang():
    class Title(Actor):
        def title(self) -> bytes:
            with open("/proc/self/cmdline", "rb") as file:
                return file.read()

    async def main():
        async with Gang(Role("title", Title, 2, resources=SMALL)) as gang:
            titles = await gang["title"].title()
            assert [title.rstrip(b"\0 ") for title in titles] == [b"ray::title[0]", b"ray::title[1]"]

    run(main())


class Owner(Actor):
    """Starts a gang, and never ends it."""

    async def start(self) -> int:
        self.inner = Gang(worker(), name="inner")
        await self.inner.__aenter__()
        return os.getpid()


@ray.remote(num_cpus=0)
class PlainOwner:
    async def start(self) -> int:
        self.inner = Gang(worker(), name="inner")
        await self.inner.__aenter__()
        return os.getpid()


@ray.remote(num_cpus=0)
def own_in_a_task() -> int:
    async def start() -> None:
        inner = Gang(worker(), name="inner")
        await inner.__aenter__()
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(start())
    return 0


@pytest.mark.parametrize("how", ["forgotten", "killed", "plain actor", "task"])
def test_a_gang_loses_its_placement_group_however_its_owner_ended(how):
    """Kind: what Ray keeps for as long as the job lasts, though who made it is dead."""

    async def main():
        if how in ("forgotten", "killed"):
            async with Gang(Role("owner", Owner, resources=SMALL)) as gang:
                (pid,) = await gang["owner"].start()
                if how == "killed":
                    os.kill(pid, signal.SIGKILL)
        elif how == "task":
            with pytest.raises(ray.exceptions.RayError):
                await own_in_a_task.options(max_retries=0).remote()
        else:
            owner = PlainOwner.remote()
            await owner.start.remote()
            await asyncio.to_thread(ray.kill, owner)
        async with asyncio.timeout(10):
            while live_placement_groups() or actor_processes() or reapers():  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # neither Ray nor /proc has an event for it

    run(main())


def reapers() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["namespace"] == "gangline"]


def test_nobody_watches_an_owner_that_has_ended_its_gangs():
    async def main():
        starter = PlainAsync.remote()
        for _ in range(2):
            await starter.start.remote()
        assert reapers() == []
        await asyncio.to_thread(ray.kill, starter)

    run(main())
