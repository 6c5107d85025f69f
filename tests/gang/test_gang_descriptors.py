"""What a further actor costs in descriptors, and what happens where there are none left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gang_harness import run, starved

from actors import Actor, Gang, Role
from collective.errors import GroupBroken, OutOfResources
from collective.types import GroupSpec
from scheduling import Resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from collective.store import TensorRef

pytestmark = pytest.mark.usefixtures("ray_session")

LARGE = 1 << 20
AT_THE_DRIVER, IN_A_GROUP = 8, 6
"""Descriptors that each further actor may cost the driver, and each further member another member."""
FEW, MANY = 2, 4


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Member(Actor):
    def __init__(self) -> None:
        self.starving = contextlib.ExitStack()

    async def descriptors(self) -> int:
        return descriptors()

    async def starve(self) -> None:
        self.starving.enter_context(starved())

    async def feed(self) -> None:
        self.starving.close()

    async def count(self) -> AsyncIterator[int]:
        for number in range(3):
            yield number

    async def ref_of(self, rank: int) -> TensorRef:
        return await self.gang["member"][rank].put()

    async def ask(self, rank: int) -> int:
        return await self.gang["member"][rank].descriptors()

    async def tell(self, src: int, dst: int) -> None:
        group = self.groups["all"]
        if group.rank == src:
            await group.send(np.ones(3), dst)
        if group.rank == dst:
            await group.recv(src)

    async def reset(self) -> None:
        await self.groups["all"].reset()

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


# The kind: who runs out of descriptors gets an error at the call, which names them; nobody hangs, nobody else is blamed
# for it, and it passes when there are some again.


def gang(size: int, *groups: GroupSpec) -> Gang:
    return Gang(Role("member", Member, size, resources=Resources(cpu=0.1)), groups=groups)


async def stream(members: Gang, rank: int) -> list[int]:
    async with members["member"][rank].count() as numbers:
        return [number async for number in numbers]


def test_a_caller_out_of_descriptors_is_told_at_each_call_and_goes_on_when_it_has_some() -> None:
    async def main() -> None:
        async with gang(4) as members, asyncio.timeout(30):
            handles = members["member"]
            ref = await handles[0].ref_of(1)
            with starved():
                for doing in (handles[2].descriptors(), stream(members, 2), ref[::2]._get()):
                    with pytest.raises(OutOfResources, match=r"this process .* no file descriptors .*ulimit -n"):
                        await doing
                with pytest.raises(ExceptionGroup) as failed:
                    await handles[2:].descriptors()
                assert failed.group_contains(OutOfResources, match=r"member\[3\]\.descriptors\(\)")
            assert len(await handles.descriptors()) == 4
            assert await stream(members, 2) == [0, 1, 2]
            assert (await ref[::2]._get()).sum() == LARGE // 2

    run(main())


def test_an_actor_out_of_descriptors_is_named_and_not_lost() -> None:
    async def main() -> None:
        async with gang(3) as members, asyncio.timeout(30):
            handles = members["member"]
            await handles[0].starve()
            for doing in (handles[0].ask(1), handles[1].ask(0)):  # a link that it opens, and one that it accepts
                with pytest.raises(OutOfResources, match="no file descriptors"):
                    await doing
            # What comes in shared memory that it cannot map comes otherwise.
            assert (await handles[0].take(np.ones(LARGE, np.uint8))).sum() == LARGE
            await handles[0].feed()
            assert await handles[1].ask(0) > 0
            assert await handles[0].ask(1) > 0

    run(main())


def test_a_member_out_of_descriptors_breaks_its_group_by_name_until_a_reset() -> None:
    async def main() -> None:
        async with gang(4, GroupSpec("all", roles=("member",))) as members, asyncio.timeout(60):
            handles = members["member"]
            await handles[2].starve()
            with pytest.raises(ExceptionGroup) as failed:
                await handles.tell(2, 3)  # no neighbours in the tree: the first message opens a link
            assert failed.group_contains(GroupBroken, match=r"member\[2\].* no file descriptors")
            await handles[2].feed()
            await handles.reset()
            await handles.tell(2, 3)

    run(main())


def test_an_actor_that_cannot_take_its_result_apart_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a module would have to be read for that: the reply that tells of it needs none."""

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "module.py")

    async def main() -> None:
        async with Gang(Role("member", Member), runtime="inproc") as members, asyncio.timeout(30):
            with monkeypatch.context() as patch:
                patch.setattr("actors._running.dumps", fail)
                with pytest.raises(OSError, match=r"Too many open files"):
                    await members["member"][0].descriptors()
            assert await members["member"][0].descriptors() > 0

    run(main())
