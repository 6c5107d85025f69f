"""Checks of the order of collectives: in one group, shared by tasks, and across groups."""

from __future__ import annotations

import asyncio
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.group import Group
from collective.testing._arrays import check_array, sample
from collective.testing._cases import MIXES, check
from collective.testing._oracle import chunks, concatenated, cut, reduced
from collective.testing._world import Each, turns
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from collective.testing._world import World
    from collective.work import Work


@check()
async def many_in_flight(world: World) -> None:
    """Hundreds of collectives issued before the first is awaited give each its own result, awaited in any order."""
    works = [[group.allreduce(np.array([number, 1])) for number in range(300)] for group in world.groups]
    order = list(range(300))
    random.Random(3).shuffle(order)
    for number in order:
        for mine in works:
            check_array(await mine[number], np.array([number, 1]) * world.size, "numpy")


@check()
async def barriers_follow_what_came_before(world: World) -> None:
    """A barrier is done after the collectives that the same member called before it, however long those take."""
    large = np.ones(1 << 18)
    before = [group.allreduce(large) for group in world.groups]
    for work, barrier in zip(before, [group.barrier() for group in world.groups], strict=True):
        await barrier
        assert work.done(), "a barrier overtook an allreduce"


@check(mixes=MIXES)
async def any_program(world: World) -> None:
    """Random programs of every operation, each rank in a task of its own and at its own pace, awaiting late."""

    async def program(group: Group, seed: int) -> None:
        shared, own = random.Random(seed), random.Random(seed * 100 + group.rank)
        waiting: list[tuple[Work[Any], Any, list[str]]] = []
        for number in range(40):
            waiting.append(_random_call(world, group, shared, seed * 1000 + number))
            if own.random() < 0.5:
                await turns(own.randrange(4))
            if own.random() < 0.3:
                _check(await waiting[0][0], *waiting.pop(0)[1:])
        for work, expected, kinds in waiting:
            _check(await work, expected, kinds)

    for seed in range(5):
        await world.each(partial(program, seed=seed))


def _random_call(world: World, group: Group, rng: random.Random, seed: int) -> tuple[Work[Any], Any, list[str]]:
    """Issue the next call of a program; return it with what this rank gets, and of which kind."""
    rank, size = group.rank, group.size
    rows, root = rng.randrange(5), rng.randrange(size)
    dtype = rng.choice(["int32", "float64"])
    parts = [sample((rows, 2), dtype, seed * 10 + other) for other in world.ranks]
    x = world.make(rank, parts[rank])
    mine, roots = [world.kinds[rank]], [world.kinds[root]]
    op = rng.choice([ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX])
    total = reduced(parts, op)
    name = rng.choice(list("abcdefghi"))
    if name == "a":
        return group.allreduce(x, op), total, mine
    if name == "b":
        return group.broadcast(x if rank == root else None, root), parts[root], roots
    if name == "c":
        return group.reduce(x, root, op), total if rank == root else None, mine
    if name == "d":
        return group.reduce_scatter(x, op), cut(total, chunks(rows, size))[rank], mine
    if name == "e":
        return group.allgather(x), concatenated(parts), mine
    if name == "f":
        return group.gather(x, root), parts if rank == root else None, mine
    if name == "g":
        pieces = [world.make(root, part) for part in parts] if rank == root else None
        return group.scatter(pieces, root), parts[rank], roots
    if name == "h":
        return group.alltoall([x] * size), parts, mine
    return group.barrier(), None, mine


def _check(result: Any, expected: Any, kinds: list[str]) -> None:
    if expected is None:
        assert result is None
    elif isinstance(expected, list):
        for part, wanted in zip(result, expected, strict=True):
            check_array(part, wanted, kinds[0])
    else:
        check_array(result, expected, kinds[0])


@check(mixes=("numpy", "mixed"))
async def tasks_share_a_group(world: World) -> None:
    """Several tasks of each rank use one group: what counts is the order of the calls, not of the awaits."""

    async def member(group: Group) -> None:
        async def one(number: int) -> None:
            array = world.make(group.rank, np.full(number + 1, group.rank + number))
            work = group.allreduce(array)
            await turns((number * 7 + group.rank * 3) % 5)
            expected = sum(np.full(number + 1, rank + number) for rank in world.ranks)
            check_array(await work, np.asarray(expected), world.kinds[group.rank])

        async with asyncio.TaskGroup() as tasks:
            for number in range(50):
                tasks.create_task(one(number))

    await world.each(member)


@check(sizes=(1, 2, 4))
async def many_groups_at_once(world: World) -> None:
    """Groups over the same endpoints know nothing of each other, whatever the order in which a rank calls them."""
    rooms = [world.groups, *[await world.form(f"group {number}") for number in range(5)]]

    async def program(group: Group) -> None:
        rank = group.rank
        mine = [room[rank] for room in rooms]
        for turn in range(5):
            order = list(range(len(mine)))
            random.Random(turn * 10 + rank).shuffle(order)
            works = {}
            for number in order:
                works[number] = mine[number].allreduce(np.array([number, turn, rank]))
                await mine[number].send(np.array([number]), (rank + 1) % group.size)
            for number in reversed(order):
                expected = np.array([number, turn, 0]) * group.size
                expected[2] = sum(world.ranks)
                check_array(await works[number], expected, "numpy")
                check_array(await mine[number].recv((rank - 1) % group.size), np.array([number]), "numpy")

    await world.each(program)


@check(sizes=(2, 3, 4))
async def overlapping_groups_in_opposite_orders(world: World) -> None:
    """Two groups that share members, called in opposite orders before either is awaited, do not wait for each other."""
    pairs: list[list[Group | None]] = []
    for first in world.ranks:
        pair = (first, (first + 1) % world.size)
        colors = Each(0 if rank in pair else None for rank in world.ranks)
        pairs.append(await world.call(Group.split, colors))
    pairs.append(list(world.groups))

    async def program(group: Group) -> None:
        mine = [pair[group.rank] for pair in pairs]
        order = [number for number, member in enumerate(mine) if member is not None]
        if group.rank % 2:
            order.reverse()
        for length in (1, 40_000):
            works = {number: _ones(mine[number], length) for number in order}
            for number in order:
                member = mine[number]
                assert member is not None
                check_array(await works[number], np.full(length, float(member.size)), "numpy")

    await world.each(program)


def _ones(group: Group | None, length: int) -> Work[Any]:
    assert group is not None
    return group.allreduce(np.ones(length))


@check(sizes=(2, 3, 4))
async def a_late_member_delays_only_its_own(world: World) -> None:
    """A collective whose last member is late holds up later ones of its group, and no other group."""
    other = await world.form("other")
    *early, late = world.groups
    waiting = [group.allreduce(np.ones(1)) for group in early]
    behind = [group.barrier() for group in early]
    for work in [group.allreduce(np.ones(3)) for group in other]:
        check_array(await work, np.full(3, float(world.size)), "numpy")
    assert not any(work.done() for work in (*waiting, *behind))
    for work in (*waiting, late.allreduce(np.ones(1))):
        check_array(await work, np.full(1, float(world.size)), "numpy")
    for barrier in (late.barrier(), *behind):
        await barrier


@check(sizes=(2,))
async def the_loop_stays_free(world: World) -> None:
    """While 64 MiB are reduced, gathered, exchanged and sent, the loop keeps turning.

    Measured as the processor time that the loop's thread spends in one turn, which other processes do not add to.
    """
    arrays = Each(np.full(16 << 20, rank + 1, np.float32) for rank in world.ranks)
    halves = Each(np.split(array, 2) for array in arrays)
    outs = Each(np.zeros(16 << 20, np.float32) for _ in world.ranks)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "allreduce": lambda: world.call(Group.allreduce, arrays),
        "allreduce into out": lambda: world.call(Group.allreduce, arrays, out=outs),
        "allreduce of a strided input": lambda: world.call(Group.allreduce, Each(array[::2] for array in arrays)),
        "reduce_scatter": lambda: world.call(Group.reduce_scatter, arrays),
        "allgather": lambda: world.call(Group.allgather, arrays),
        "broadcast": lambda: world.call(Group.broadcast, world.only(0, arrays[0]), 0),
        "alltoall": lambda: world.call(Group.alltoall, halves),
        "send": lambda: world.call(lambda group: group.send(arrays[0], 1) if group.rank == 0 else group.recv(0)),
    }
    slow = {}
    for name, call in calls.items():
        longest, beats, duration = await _longest_turn(call())
        if longest > 0.025 or beats < duration / 0.05:
            slow[name] = f"a turn of {longest * 1000:.0f} ms, {beats} beats in {duration * 1000:.0f} ms"
    assert not slow, f"the loop was blocked: {slow}"


async def _longest_turn(awaitable: Any) -> tuple[float, int, float]:
    """Await something; return the longest processor time of one turn, the number of beats, and how long it took."""
    longest = 0.0
    beats = 0
    running = True

    async def beat() -> None:
        nonlocal longest, beats
        last = time.thread_time()
        while running:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            longest = max(longest, now - last)
            last = now
            beats += 1

    beating = asyncio.create_task(beat())
    begin = time.perf_counter()
    try:
        await awaitable
    finally:
        duration = time.perf_counter() - begin
        running = False
        await beating
    return longest, beats, duration
