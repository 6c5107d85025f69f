"""What only the runtime `inproc` promises."""

from __future__ import annotations

import os

import numpy as np
from gang_harness import run

from actors import Actor, Gang, Role
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
