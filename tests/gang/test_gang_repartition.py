"""Repartition between actors: from those who have it to others, in processes of their own."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import torch
from gang_harness import run

from actors import Actor, Gang, Role
from collective import CollectiveMismatch, GroupSpec, Layout, Replicate, Shard
from collective._links import arena
from collective.links import arena_statistics

SHAPE = (600, 1024)  # of float32: whole pages
ROWS = Layout(SHAPE, 2, [Shard(0)])
TO = {"columns": Layout(SHAPE, 2, [Shard(1)], (2, 3)), "all": Layout(SHAPE, 2, [Replicate()], (2, 3))}


class Holder(Actor):
    async def give(self, step: int) -> None:
        group = self.groups["all"]
        part = torch.from_numpy(ROWS.local(group.rank, whole(step)).copy())
        await group.repartition({"columns": part, "all": part}, {"columns": ROWS, "all": ROWS}, TO, share=step > 0)

    async def take(self, step: int) -> list[float]:
        group = self.groups["all"]
        parts = await group.repartition(None, {"columns": ROWS, "all": ROWS}, TO, share=step > 0)
        np.testing.assert_array_equal(parts["all"], whole(step))
        np.testing.assert_array_equal(parts["columns"], TO["columns"].local(group.rank, whole(step)))
        parts["all"] += self.rank  # it is this rank's own, shared or not
        await self.groups["new"].barrier()
        return [float(parts["all"][0, 0]), float(parts["all"][-1, -1])]

    async def look(self) -> tuple[int, int, bool]:
        """Share numpy arrays; return the process, what it has of shared memory, and whether the result is writable."""
        group = self.groups["all"]
        held = ROWS.local(group.rank, whole(0)) if group.rank < 2 else None
        part = await group.repartition(held, ROWS, TO["all"], share=True)
        owned = arena_statistics().owned
        await group.barrier()
        if part is not None:
            np.testing.assert_array_equal(part, whole(0))
        return os.getpid(), owned, part is not None and part.flags.writeable

    async def misfit(self) -> str:
        group = self.groups["all"]
        held = ROWS.local(group.rank, whole(0)) if group.rank < 2 else None
        try:
            await group.repartition(held[:7] if group.rank == 1 else held, ROWS, TO["all"])
        except (ValueError, CollectiveMismatch) as error:
            await group.reset()
            return str(error)
        raise AssertionError("a part of another shape was taken")


def whole(step: int) -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + step


def test_weights_go_from_two_actors_to_two_others(runtime, monkeypatch):
    monkeypatch.setattr(arena, "_arena", None)  # in process, other tests' would count as these actors' otherwise

    async def main():
        groups = [GroupSpec("all", ("old", "new")), GroupSpec("new", ("new",))]
        async with Gang(Role("old", Holder, 2), Role("new", Holder, 2), groups=groups, runtime=runtime) as gang:
            for step in range(3):
                _, seen = await asyncio.gather(gang["old"].give(step), gang["new"].take(step))
                last = float(whole(step)[-1, -1])
                assert seen == [[step, last], [step + 1, last + 1]]
            looks = [each for role in await asyncio.gather(gang["old"].look(), gang["new"].look()) for each in role]
            owned = {process: count for process, count, _ in looks}
            assert sum(owned.values()) == whole(0).nbytes  # one copy, whoever looks at it
            assert not any(writable for *_, writable in looks)
            for said in await asyncio.gather(gang["old"].misfit(), gang["new"].misfit()):
                for text in said:
                    assert "local has shape (7, 1024), and the part of rank 1 in src" in text

    run(main())
