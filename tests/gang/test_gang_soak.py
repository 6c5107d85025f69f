"""Nothing that was used for a while is left: counts before and after many rounds of everything."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gang_harness import actor_processes, live_placement_groups, run

from actors import Actor, Gang, Role
from collective import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

ROUNDS = 4
SOME = ("Engine", "Mux", "Group", "Dispatcher", "Connection")
"""Classes of this library that are there while a gang runs; all are counted."""


def counts() -> Counter[str]:
    """Return how much there is of everything in this process."""
    gc.collect()
    ours = Counter(
        type(each).__name__
        for each in gc.get_objects()
        if str(type(each).__module__).partition(".")[0] in ("actors", "collective", "scheduling")
    )
    maps = Path("/proc/self/maps").read_text().splitlines()
    del ours["Ending"]  # groups remember scopes that ended, some thousands at most
    ours["threads"] = threading.active_count()
    ours["descriptors"] = len(os.listdir("/proc/self/fd"))
    ours["mappings"] = sum("memfd:" in line for line in maps)
    ours["tasks"] = len(asyncio.all_tasks())
    return ours


async def grown(look: Callable[[], Awaitable[list[Counter[str]]]], before: list[Counter[str]]) -> list[dict[str, int]]:
    """Return what there is more than before by ROUNDS, once that is nothing, or else after 10 s: some ends later.

    Less is what the last round left for the next one to use or to replace.
    """
    left: list[dict[str, int]] = [{"": 1}]
    for _ in range(200):
        more = [after - earlier for after, earlier in zip(await look(), before, strict=True)]
        left = [{name: count for name, count in each.items() if count >= ROUNDS} for each in more]
        if not any(left):
            break
        await asyncio.sleep(0.05)
    return left


class Member(Actor):
    async def sum(self) -> float:
        return float((await self.groups["dp"].allreduce(np.ones(1000)))[0])

    async def split(self) -> int:
        part = await self.groups["dp"].split(self.rank % 2)
        await part.barrier()
        size = part.size
        await part.aclose()
        return size

    async def fail(self) -> None:
        if self.rank == 0:
            raise ValueError("on rank 0")
        await self.groups["dp"].barrier()

    async def hang(self) -> None:
        await asyncio.get_running_loop().create_future()

    def plain(self, array: Any) -> Any:
        return array

    async def rows(self) -> AsyncIterator[int]:
        for number in range(100):
            yield number

    async def counts(self) -> Counter[str]:
        return counts()


def gang(runtime: str) -> Gang:
    role = Role("m", Member, 2, resources=Resources(cpu=0.1))
    return Gang(role, groups=[GroupSpec("dp", roles=("m",))], runtime=runtime)


async def use(running: Gang) -> None:
    """Do everything once: calls, collectives, subgroups, streams, failures, cancellations, resets."""
    members = running["m"]
    assert await members.sum() == [2.0, 2.0]
    assert await members.split() == [1, 1]
    array = np.ones(1 << 20, np.uint8)
    assert [each.nbytes for each in await members.plain(array)] == [array.nbytes] * 2
    async with members.rows() as streams:
        assert await anext(streams[0]) == 0
        assert [row async for row in streams[1]] == list(range(100))
    with pytest.raises(ExceptionGroup):
        await members.fail()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await members.hang()
    await running.groups["dp"].reset()
    assert await members.sum() == [2.0, 2.0]


def test_members_that_live_on_keep_nothing_of_what_was(runtime):
    """Kind: something of a call, a subgroup, a stream, a failure or a reset stays in a member or in the driver."""

    async def main():
        async with gang(runtime) as running:

            async def look() -> list[Counter[str]]:
                return [counts(), *await running["m"].counts()]

            for _ in range(2):  # what is made at the first use
                await use(running)
            await look()
            before = await look()
            assert all(sum(each[name] for each in before) for name in SOME)
            for _ in range(ROUNDS):
                await use(running)
            assert await grown(look, before) == [{}, {}, {}]

    run(main())


def test_gangs_that_come_and_go_leave_nothing(runtime):
    """Kind: something of a gang, or of an actor that died, stays in the driver, in Ray, or as a process."""

    async def once() -> None:
        async with gang(runtime) as running:
            await use(running)
            if runtime == "ray":
                await running["m"][0].counts()
                os.kill(next(iter(actor_processes())), signal.SIGKILL)

    async def look() -> list[Counter[str]]:
        return [counts()]

    async def main():
        await once()
        await once()
        before = await look()
        for _ in range(ROUNDS):
            await once()
        assert await grown(look, before) == [{}]
        if runtime == "ray":
            assert live_placement_groups() == []
            assert actor_processes() == {}

    run(main())
