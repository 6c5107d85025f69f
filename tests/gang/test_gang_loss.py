"""An actor that dies: who hears of it, how soon, and what goes on."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from gang_harness import Stopwatch, is_there, run

from actors import Actor, Gang, GangStartError, Role, _fates
from collective import GroupSpec, PeerLost
from scheduling import Resources

SMALL = Resources(cpu=0.5)
ALL = GroupSpec("all", ("worker",), timeout=60.0)
ROOT = Path(__file__).parent.parent.parent


class Worker(Actor):
    async def pid(self) -> int:
        return os.getpid()

    async def wait(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def allreduce(self) -> str:
        """Take part in a collective that not everybody joins, and tell how it fails."""
        try:
            await self.groups["all"].allreduce(np.ones(1))
        except PeerLost as error:
            return f"{error.role}[{error.rank}]"
        return "it succeeded"

    async def recv(self, src: int) -> str:
        try:
            await self.groups["all"].recv(src)
        except PeerLost as error:
            return f"{error.role}[{error.rank}]"
        return "it succeeded"

    async def peers(self) -> list[str]:
        seen = []
        for handle in self.gang["worker"]:
            try:
                await handle.pid()
            except PeerLost:
                seen.append("lost")
            else:
                seen.append("there")
        return seen


async def kill(gang: Gang, rank: int) -> None:
    """Let an actor die without a word."""
    if gang._runtime.name == "ray":
        os.kill(await gang["worker"][rank].pid(), signal.SIGKILL)
    else:
        await gang._crew["worker", rank].process.kill()


def test_the_survivors_hear_within_a_second(runtime):
    async def main():
        async with Gang(Role("worker", Worker, 3, resources=SMALL), groups=[ALL], runtime=runtime) as gang:
            one, two, doomed = gang["worker"]
            pids = await gang["worker"].pid()
            call = asyncio.create_task(doomed.wait())
            calls = [one.allreduce(), two.allreduce(), one.recv(2), two.recv(2)]
            pending = [asyncio.create_task(each) for each in calls]
            # Calls start in their order, so that what is above waits by now.
            await gang["worker"].pid()
            await kill(gang, 2)
            watch = Stopwatch()
            with pytest.raises(PeerLost, match=r"worker\[2\] was lost during wait: .*ended"):
                await call
            assert await asyncio.gather(*pending) == ["worker[2]"] * 4
            assert float(watch) < 1.0
            # And so does all that comes later.
            assert await one.allreduce() == "worker[2]"
            assert await one.peers() == ["there", "there", "lost"]
            with pytest.raises(PeerLost):
                await doomed.pid()
            watch = Stopwatch()
        assert float(watch) < 5.0
        if runtime == "ray":
            assert not any(map(is_there, pids))

    run(main())


def test_a_loss_is_told_to_who_has_no_link_to_it():
    # Far apart in any tree over so many members.
    async def main():
        async with Gang(Role("worker", Worker, 40), groups=[ALL], runtime="inproc") as gang:
            pending = [asyncio.create_task(gang["worker"][rank].recv(39)) for rank in range(39)]
            await gang["worker"].pid()
            await kill(gang, 39)
            assert await asyncio.gather(*pending) == ["worker[39]"] * 39

    run(main())


def test_all_actors_may_die(runtime):
    async def main():
        async with Gang(Role("worker", Worker, 2, resources=SMALL), runtime=runtime) as gang:
            await asyncio.gather(kill(gang, 0), kill(gang, 1))
            for handle in gang["worker"]:
                with pytest.raises(PeerLost):
                    await handle.wait()

    run(main())


DRIVER = """
import asyncio, sys
import ray
from test_gang_loss import Role, Gang, Worker, SMALL

async def main():
    async with Gang(Role("worker", Worker, 2, resources=SMALL)) as gang:
        print(*await gang["worker"].pid(), flush=True)
        await gang["worker"].wait()

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
asyncio.run(main())
"""


def test_actors_do_not_outlive_a_driver_that_is_killed(ray_session):
    import ray

    address = ray.get_runtime_context().gcs_address
    folder = tempfile.mkdtemp(prefix="d-")
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": folder}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, address], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        processes = list(map(psutil.Process, pids))
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    shutil.rmtree(folder)  # which nobody was left to do


def test_a_gang_survives_the_loss_of_a_process_that_it_only_calls(ray_session):
    async def main():
        async with Gang(Role("worker", Worker, 3, resources=SMALL), groups=[]) as gang:
            await kill(gang, 1)
            with pytest.raises(PeerLost):
                await gang["worker"][1].wait()
            assert len({await gang["worker"][rank].pid() for rank in (0, 2)}) == 2

    run(main())


class Dying(Worker):
    async def die(self, how: int) -> None:
        if how >= 0:
            os._exit(how)
        os.kill(os.getpid(), -how)

    def __init__(self, in_constructor: bool = False) -> None:
        if in_constructor:
            os._exit(5)


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 15), reason="before Linux 6.15 only the parent is told"
)
def test_how_a_process_ended_is_in_the_cause(ray_session):
    """Kind: an error says less of a death than this process can know."""

    async def main():
        ways = (3, "its process ended with exit code 3"), (-signal.SIGKILL, "its process was ended by SIGKILL")
        for how, says in ways:
            async with Gang(Role("worker", Dying, 2, resources=SMALL)) as gang:
                zero, one = gang["worker"]
                with pytest.raises(PeerLost) as caught:
                    await zero.die(how)
                assert caught.value.cause.startswith(says)
                with pytest.raises(PeerLost, match=says):
                    await zero.pid()
                with pytest.raises(ExceptionGroup) as several:
                    await gang["worker"].pid()
                assert several.value.exceptions[0].cause.startswith(says)
                assert await one.pid() != 0
        with pytest.raises(GangStartError, match=r"failed in its constructor: its process ended with exit code 5"):
            async with Gang(Role("worker", Dying, 1, args=(True,), resources=SMALL)):
                pass
        assert not _fates.known

    run(main())
