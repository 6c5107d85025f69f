"""What only the runtime `inproc` promises."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
from gang_harness import run

from actors import Actor, Gang, GangStartError, Role
from collective import GroupSpec


class Rank(Actor):
    async def pid(self) -> int:
        return os.getpid()

    async def me(self) -> Rank:
        return self

    async def total(self) -> float:
        return float((await self.groups["all"].allreduce(np.full(2, self.rank)))[0])

    def __reduce__(self):
        return Rank.find, (self.rank,)

    @staticmethod
    def find(rank: int) -> type[Rank]:
        return Rank


def test_actors_are_of_the_very_class_that_was_given():
    async def main():
        async with Gang(Role("rank", Rank, 2), runtime="inproc") as gang:
            assert await gang["rank"].pid() == [os.getpid()] * 2
            assert await gang["rank"].me() == [Rank, Rank]

    run(main())


def test_a_thousand_actors():
    async def main():
        async with Gang(Role("rank", Rank, 1000), runtime="inproc") as gang:
            assert len(await gang["rank"].pid()) == 1000

    run(main(), debug=False)  # debugging makes every future remember where it was made


def test_many_ranks_in_a_group():
    async def main():
        groups = [GroupSpec("all", ("rank",))]
        async with Gang(Role("rank", Rank, 100), groups=groups, runtime="inproc") as gang:
            assert await gang["rank"].total() == [sum(range(100))] * 100

    run(main(), debug=False)


class Littering(Actor):
    """Starts tasks wherever it can, and ends none."""

    async def setup(self) -> None:
        self.litter("setup")

    async def wait(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def work(self) -> None:
        self.litter("work")

    async def teardown(self) -> None:
        self.litter("teardown")

    def litter(self, where: str) -> None:
        async def nested() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.wait(), name=f"task in a task of {where}")

        setattr(self, where, asyncio.create_task(nested(), name=f"task of {where}"))


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_actor_has_started_ends_with_it(fails):
    """Kind: tasks outlive the actor that started them."""

    class Failing(Littering):
        async def setup(self) -> None:
            await super().setup()
            if self.rank:
                raise ValueError("no setup")

    async def main():
        outer = asyncio.create_task(asyncio.sleep(3600))
        try:
            async with Gang(Role("a", Failing if fails else Littering, 2), runtime="inproc") as gang:
                await gang["a"].work()
        except GangStartError:
            assert fails
        assert asyncio.all_tasks() == {outer, asyncio.current_task()}
        outer.cancel()
        await asyncio.wait([outer])

    run(main())


class Forgetful(Actor):
    async def setup(self) -> None:
        self.inner = Gang(Role("a", Littering, 2), runtime="inproc")
        await self.inner.__aenter__()


def test_a_gang_that_an_actor_forgot_ends_with_it():
    """Kind: what an actor has started and left outlives it."""

    async def main():
        async with Gang(Role("forgetful", Forgetful, 2), runtime="inproc"):
            pass

    run(main())  # fails where tasks are left
