"""The data plane "two-level": how it is put together, fails, and lets go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plane_harness import all_of, finish, held, make_planes, opened, start_members, until_held
from test_planes import assert_reduced, assert_same_bits, expect, make, reducible

from collective._backends import _two_level_alltoall, _two_level_stages
from collective.errors import BackendError
from collective.group import Group
from collective.testing import world
from collective.testing._world import Each
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collective._backends.two_level import TwoLevelPlane
    from collective.abc import DataPlane

LARGE = 3 << 20
"""Elements of a float64 array that goes in several parts."""


def test_groups_say_what_is_in_use() -> None:
    """Also those split from one: inside a host they have one level, and across hosts another one."""

    async def main() -> None:
        async with world("two-level", 4, hosts=("a", "b", "b", "a")) as here:
            assert {(group.backend, group.backends) for group in here.groups} == {("two-level", ("shm", "gloo"))}
            for colors, backends in (([0, 1, 1, 0], ("shm",)), ([0, 0, 1, 1], ("gloo",)), ([0] * 4, ("shm", "gloo"))):
                parts = await here.call(Group.split, Each(colors))
                assert {part.backends for part in parts} == {backends}
        async with world("memory", 2) as here:
            assert here.groups[0].backends == ("memory",)

    asyncio.run(main())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything take the way of what is long, in parts of a few elements."""
    for limit, value in {"SHORT": -1, "_PART": 64, "_STAGED": 192, "_WIDENED": 96, "_INLINE": 0}.items():
        monkeypatch.setattr(_two_level_stages, limit, value)
    monkeypatch.setattr(_two_level_alltoall, "_LEAST", 8)


@pytest.mark.usefixtures("small_parts")
def test_the_whole_table_in_many_parts() -> None:
    """They overlap; the bits are those of reducing by host."""
    length, size, counts = 50, 4, [20, 0, 3, 27]

    async def main() -> None:
        async with opened("two-level", size) as planes:
            for op, dtype in reducible():
                arrays = [make(dtype, length, rank, op) for rank in range(size)]
                expected = expect(arrays, op, "two-level")
                outs = [np.empty_like(expected) for _ in planes]
                await all_of([p.allreduce(a, o, op) for p, a, o in zip(planes, arrays, outs, strict=True)])
                for out in outs:
                    assert_reduced(out, expected, op)
                    assert_same_bits(out, outs[0])
                for root in range(size):
                    tops = [np.empty_like(expected) if rank == root else None for rank in range(size)]
                    await all_of([p.reduce(a, t, op, root) for p, a, t in zip(planes, arrays, tops, strict=True)])
                    assert tops[root] is not None
                    assert_reduced(tops[root], expected, op)
                parts = [np.empty(count, expected.dtype) for count in counts]
                await all_of(
                    [p.reduce_scatter(a, o, op, counts) for p, a, o in zip(planes, arrays, parts, strict=True)]
                )
                assert_reduced(np.concatenate(parts), expected, op)

    asyncio.run(main())


@pytest.mark.usefixtures("small_parts")
def test_many_operations_in_many_parts_at_once() -> None:
    """Members issue them at different paces, and all are pending; one after another they come out right."""
    size, counts = 5, [100, 0, 7, 300, 1]  # on hosts a, b, b, a, c

    def length(src: int, dst: int, root: int) -> int:
        return 0 if dst == root else 10 * src + 40 * dst

    async def main() -> None:
        async with opened("two-level", size) as planes:
            seen: list[list[np.ndarray]] = [[] for _ in planes]
            works = []
            for rank, plane in enumerate(planes):
                for root in range(size):
                    array = np.full(1000, root if rank == root else 99, np.uint8)
                    whole = np.empty(sum(counts), np.uint8)
                    sent = [np.full(length(rank, to, root), 10 * rank + to, np.uint8) for to in range(size)]
                    got = [np.empty(length(src, rank, root), np.uint8) for src in range(size)]
                    seen[rank] += [array, whole, *got]
                    works.append(plane.broadcast(array, root))
                    works.append(plane.allgather(np.full(counts[rank], rank, np.uint8), whole, counts))
                    works.append(plane.alltoall(sent, got))
                await asyncio.sleep(0)
            await all_of(works)
            for rank in range(size):
                arrays = iter(seen[rank])
                for root in range(size):
                    assert (next(arrays) == root).all()
                    assert_same_bits(next(arrays), np.repeat(np.arange(size, dtype=np.uint8), counts))
                    for src in range(size):
                        assert (next(arrays) == 10 * src + rank).all()

    asyncio.run(main())


async def use(*, abandon: bool) -> None:
    planes = make_planes("two-level", 4)
    await asyncio.gather(*(plane.open() for plane in planes))
    arrays = [np.ones(LARGE) for _ in planes]
    await all_of([p.allreduce(a, a, ReduceOp.SUM) for p, a in zip(planes, arrays, strict=True)])
    assert all((array == 4).all() for array in arrays)
    if abandon:
        for plane in planes[1:]:
            plane.allreduce(arrays[0], arrays[1], ReduceOp.SUM)
        for plane in planes:
            plane.abandon()
    else:
        await asyncio.gather(*(plane.aclose() for plane in planes))


def test_nothing_is_left_behind() -> None:
    """By groups that are closed, abandoned at work, or given up while some of their members were meeting."""

    async def main() -> None:
        for abandon in (False, True):
            await use(abandon=abandon)
        before = held()
        for abandon in (False, True):
            await use(abandon=abandon)
        for some, met in (([0, 1], False), ([1, 2], True), ([0, 3], True)):  # the leaders; each host
            planes = make_planes("two-level", 4)
            opening = [asyncio.create_task(planes[rank].open()) for rank in some]
            await asyncio.wait([opening[met]], timeout=10 if met else 0.05)
            opening[0].cancel()
            planes[some[1]].abandon()
            with pytest.raises(asyncio.CancelledError):
                await opening[0]
            if met:  # the leader's host has met, and it waits for the other leader
                await opening[1]
            else:
                with pytest.raises(BackendError):
                    await opening[1]
        await until_held(before)

    asyncio.run(main())


@pytest.mark.parametrize("level", ["_inner", "_outer"])
def test_what_fails_on_one_level_fails_the_operation(level: str) -> None:
    """It is told once nothing of the caller's is written any more, and nothing runs after it."""

    async def main() -> None:
        planes: list[Any] = make_planes("two-level", 3)
        await asyncio.gather(*(plane.open() for plane in planes))
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(BackendError("it is broken"))
        plane: TwoLevelPlane = planes[0]
        below: DataPlane = getattr(plane, level)
        below.allgather = lambda *_: failed  # type: ignore[method-assign]
        target = np.zeros(3)
        works = [p.allreduce(np.ones(3), target, ReduceOp.SUM) for p in planes[:1]]
        with pytest.raises(BackendError, match="two-level: it is broken"):
            await works[0]
        with pytest.raises(BackendError, match="not open"):
            plane.allreduce(np.ones(3), target, ReduceOp.SUM)
        for each in planes:
            each.abandon()
        assert not target.any()

    asyncio.run(main())


def test_who_is_done_may_leave_while_others_still_receive(tmp_path: Any) -> None:
    processes = start_members(
        "two-level",
        tmp_path,
        4,
        """
        for count in (10, 1 << 16, 20 << 20):
            array = np.full(count, 7 if rank == 1 else 0, np.uint8)
            await plane.broadcast(array, 1)
            assert (array == 7).all()
        await plane.aclose()
        """,
    )
    assert finish(processes, 110) == [0] * 4  # Each imports torch: together that takes a loaded machine long.
