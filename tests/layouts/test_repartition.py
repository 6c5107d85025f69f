"""Repartition through real groups: drawn layouts, hundreds of ranks, and what breaks in the middle."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_harness import RANKS, pairs, spread

from actors import Actor, Gang, Role
from collective import GroupBroken, GroupSpec, Layout, Replicate, Shard
from collective._core import arithmetic, movement
from collective.testing import world


@settings(max_examples=50, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=3), st.booleans(), st.sampled_from(["aaaaaaaa", "aabbabcc"]))
def test_drawn_layouts(drawn, share, hosts):
    async def main():
        async with world("memory", RANKS) as opened:
            for group in opened.groups:
                pretended = zip(group.members, hosts, strict=True)
                group._engine.members = tuple(replace(m, address=replace(m.address, host=h)) for m, h in pretended)
            sources, targets = {n: s for n, (s, _) in enumerate(drawn)}, {n: d for n, (_, d) in enumerate(drawn)}
            held, whole = zip(*(spread(src, n) for n, (src, _) in enumerate(drawn)), strict=True)
            works = [
                group.repartition({n: h.get(group.rank) for n, h in enumerate(held)}, sources, targets, share=share)
                for group in opened.groups
            ]
            for rank, work in enumerate(works):
                result = await work
                for number, (_, dst) in enumerate(drawn):
                    if rank in dst.ranks:
                        np.testing.assert_array_equal(result[number], dst.local(rank, whole[number]))
                    else:
                        assert result is None or result[number] is None

    asyncio.run(main())


class Holder(Actor):
    async def move(self, src: Layout, dst: Layout) -> np.ndarray | None:
        group = self.groups["all"]
        whole = np.arange(src.shape[0] * 8).reshape(-1, 8)
        return await group.repartition(src.local(group.rank, whole) if group.rank in src.ranks else None, src, dst)


def test_512_to_256_ranks():
    async def main():
        shape = (512, 8)
        groups = [GroupSpec("all", ("old", "new"))]
        async with Gang(Role("old", Holder, 512), Role("new", Holder, 256), groups=groups, runtime="inproc") as gang:
            src = Layout(shape, 512, [Shard(0)])
            dst = Layout(shape, (64, 4), [Shard(0), Shard(1)], range(512, 768))
            _, parts = await asyncio.gather(gang["old"].move(src, dst), gang["new"].move(src, dst))
            whole = np.arange(512 * 8).reshape(shape)
            for rank, part in enumerate(parts, 512):
                np.testing.assert_array_equal(part, dst.local(rank, whole))

    asyncio.run(main())


def test_a_break_in_the_middle_reaches_all_and_leaves_nothing(monkeypatch):
    """The one that passes on cannot go on, after a part has come: the others are told, and hold nothing of it."""

    async def main():
        shape = (64, 1 << 16)
        src, dst = Layout(shape, 1, [Replicate()]), Layout(shape, 3, [Replicate()], (1, 2, 3))
        async with world("memory", 4) as opened:
            whole = np.zeros(shape)
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            monkeypatch.setattr(movement._Inflow, "take", _run_out_of_memory)
            works = [group.repartition(whole if group.rank == 0 else None, src, dst) for group in opened.groups]
            for work in works:
                with pytest.raises((GroupBroken, MemoryError)):
                    await work
            monkeypatch.undo()
            del works, work
            await opened.reset()
            for _ in range(100):  # a thread or a cancelled task may be about to let go of the last of it
                gc.collect()
                left = tracemalloc.get_traced_memory()[0] - before
                if left < whole.nbytes / 8:
                    break
                await asyncio.sleep(0.02)
            assert left < whole.nbytes / 8
            tracemalloc.stop()
            small = np.ones((6, 2))
            rows, every = Layout((6, 2), 4, [Shard(0)]), Layout((6, 2), 4, [Replicate()])
            again = [group.repartition(rows.local(group.rank, small), rows, every) for group in opened.groups]
            for each in again:
                np.testing.assert_array_equal(await each, small)

    asyncio.run(main())


def test_a_break_leaves_out_to_its_caller_at_once(monkeypatch):
    """Also where the caller keeps the loop from its next turn, while a thread copies what stays."""

    async def main():
        view_of, copying = arithmetic.view_of, threading.Event()

        def slowly(*which):
            copying.set()
            time.sleep(0.02)
            return view_of(*which)

        monkeypatch.setattr(arithmetic, "view_of", slowly)
        monkeypatch.setattr(arithmetic, "LONG", 1 << 16)
        rows = Layout((8, 1 << 14), 2, [Shard(0)])
        async with world("memory", 2) as opened:
            outs = [np.zeros(rows.local_shape(rank)) for rank in range(2)]
            ones = np.ones((4, 1 << 14))
            works = [group.repartition(ones, rows, rows, out=outs[group.rank]) for group in opened.groups]
            assert await asyncio.to_thread(copying.wait, 10)
            opened.groups[0]._engine.break_everywhere("the test")
            for work, out in zip(works, outs, strict=True):
                with pytest.raises(GroupBroken):
                    await work
                out[:] = 7
            time.sleep(0.1)  # noqa: ASYNC251  # the tasks have no turn
            assert all((out == 7).all() for out in outs)

    asyncio.run(main())


def _run_out_of_memory(self, message):
    self._movement.fail(MemoryError("no room for the test"))
    return True
