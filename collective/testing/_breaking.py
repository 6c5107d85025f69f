"""Checks of contract 7: calls that end in mid-collective, and resets."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import GroupBroken, GroupError
from collective.group import Group
from collective.scopes import CallScope, reset_everywhere
from collective.testing._arrays import check_array
from collective.testing._calls import unfinished, works_again
from collective.testing._cases import check
from collective.testing._world import attempt, outcome, outcomes, turns

if TYPE_CHECKING:
    from collective.testing._world import World
    from collective.work import Work


@check(sizes=(2, 3, 4))
async def abandoned_calls_break_the_group(world: World) -> None:
    """A call that ends with an unfinished collective breaks the group on all, naming rank, operation and line."""
    for rank in world.ranks:
        for name, issue in unfinished(np.ones(8)).items():
            with CallScope() as scope:
                left = issue(world.groups[rank])
            waiting = [group.recv(rank, tag=9) for group in world.groups if group.rank != rank]
            await turns()
            scope.abandon("it was cancelled")
            for error in await outcomes([left, *waiting]):
                assert isinstance(error, GroupBroken), f"{name} left by rank {rank} gave {error!r}"
                for part in (f"rank {rank}", world.member(rank), name, "_calls.py:", "it was cancelled"):
                    assert part in str(error), f"{name} left by rank {rank}: {part!r} is missing in {error}"
            for group in world.groups:
                for error in await outcomes([attempt(group.barrier), attempt(group.recv, 0)]):
                    assert isinstance(error, GroupBroken), f"after {name} was left, rank {group.rank} got {error!r}"
            await world.reset()
            await works_again(world)


@check(sizes=(1, 2, 3, 4))
async def the_same_call_again(world: World) -> None:
    """A call that was cancelled anywhere in a collective, a reset, the same call again: right values, every time."""
    for length in (3, 200_000):
        for delay in range(0, 24, 3):
            array = np.full(length, delay + 1.0)
            tasks = [
                asyncio.create_task(_step(group, array))
                for group in world.groups
                if group.rank != delay % world.size or world.size == 1
            ]
            await turns(delay)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                assert task.cancelled() or isinstance(task.exception(), GroupBroken) or world.size == 1
            await world.reset()
            for result in await world.each(partial(_step, array=-array)):
                check_array(result, -array * world.size, "numpy")


async def _step(group: Group, array: np.ndarray) -> Any:
    """What an actor's method does, and what the call layer does about it."""
    with CallScope() as scope:
        try:
            await group.send(array[:2], (group.rank + 1) % group.size)
            shard = await group.reduce_scatter(array)
            whole = await group.allgather(shard)
            received = await group.recv((group.rank - 1) % group.size)
            check_array(received, array[:2], "numpy")
            return whole
        except BaseException as error:
            scope.abandon(f"the call ended by {type(error).__name__}")
            raise


@check(sizes=(2, 3, 4))
async def broken_collectives_write_no_more(world: World) -> None:
    """Once a collective has failed because the group broke, nothing is written to its `out` any more."""
    length = 300_000
    for delay in range(0, 32, 4):
        outs = [np.zeros(length) for _ in world.ranks]
        with CallScope() as scope:
            works = [group.allreduce(np.ones(length), out=out) for group, out in zip(world.groups, outs, strict=True)]
        await turns(delay)
        scope.abandon("it was cancelled")
        results = await outcomes(works)
        for result, out in zip(results, outs, strict=True):
            if isinstance(result, Exception):
                assert isinstance(result, GroupBroken), f"got {result!r}"
            else:
                check_array(result, np.full(length, float(world.size)), "numpy")
            out[...] = -1
        await world.reset()
        await works_again(world)
        assert all((out == -1).all() for out in outs), f"an out was written after its Work was done, {delay} turns in"


@check(sizes=(2, 3, 4))
async def one_member_resets_all(world: World) -> None:
    """`reset_everywhere`, with what `abandon` returned at one member, mends the group on every member."""
    for rank in world.ranks:
        with CallScope() as scope:
            left = world.groups[rank].barrier()
        tokens = scope.abandon("it failed")
        assert isinstance(await outcome(left), GroupBroken)
        await reset_everywhere(tokens)
        await works_again(world)
    assert len({group.epoch for group in world.groups}) == 1
    await reset_everywhere(tokens)
    await works_again(world)


@check(sizes=(2, 3))
async def finished_calls_break_nothing(world: World) -> None:
    """Abandoning a scope whose collectives are done, or that issued only sends and recvs, breaks nothing."""
    with CallScope() as scope:
        receiving = world.groups[0].recv(1)
        await world.call(Group.allreduce, np.ones(1))
    outside = world.groups[0].barrier()
    scope.abandon("it failed")
    await world.groups[1].send(np.ones(1), 0)
    check_array(await receiving, np.ones(1), "numpy")
    for work in [outside, *[group.barrier() for group in world.groups[1:]]]:
        await work
    await works_again(world)


@check(sizes=(2, 3))
async def scopes_follow_tasks(world: World) -> None:
    """A collective that a task of the call issued counts as the call's; one of another call does not."""

    async def issue() -> Work[Any]:
        return world.groups[0].barrier()

    with CallScope() as scope:
        left = await asyncio.create_task(issue())
    with CallScope() as other:
        pass
    other.abandon("another call failed")
    await turns()
    assert not left.done()
    scope.abandon("the call failed")
    assert isinstance(await outcome(left), GroupBroken)
    await world.reset()
    await works_again(world)


@check(sizes=(1, 2, 3, 4))
async def reset_starts_a_new_epoch(world: World) -> None:
    """A reset, of a healthy group too, drops what is pending and buffered, and raises the epoch equally on all."""
    epochs = {world.groups[0].epoch}
    for _ in range(3):
        receiver = world.groups[-1]
        stale = receiver.recv(0, tag=1)
        await world.groups[0].send(np.array([1]), receiver.rank, tag=2)
        large = world.groups[0].send(np.ones(1_000_000), receiver.rank, tag=3)  # more than is ever buffered
        await turns()
        await world.reset()
        for error in await outcomes([stale, large]):
            assert isinstance(error, GroupError), f"a reset left {error!r} pending"
        for tag in (1, 2, 3):
            await world.groups[0].send(np.array([10 + tag]), receiver.rank, tag=tag)
            check_array(await receiver.recv(0, tag=tag), np.array([10 + tag]), "numpy")
        now = {group.epoch for group in world.groups}
        assert len(now) == 1, f"after a reset members are in epochs {now}"
        assert min(now) > max(epochs)
        epochs |= now
        await works_again(world)


@check(sizes=(2, 3, 4))
async def reset_waits_for_all(world: World) -> None:
    """Nobody's reset returns before every member has called it; what one does right after it is not lost."""
    *early, late = world.groups

    async def reset_and_go(group: Group) -> Any:
        await group.reset()
        for rank in world.ranks:
            await group.send(np.array([group.rank]), rank)
        for rank in world.ranks:
            check_array(await group.recv(rank), np.array([rank]), "numpy")
        return await group.allreduce(np.array([group.rank]))

    waiting = [asyncio.create_task(reset_and_go(group)) for group in early]
    await turns(50)
    assert not any(task.done() for task in waiting)
    assert isinstance(await outcome(attempt(early[0].barrier)), GroupBroken)
    for task in (*waiting, asyncio.create_task(reset_and_go(late))):
        check_array(await task, np.array([sum(world.ranks)]), "numpy")


@check(sizes=(2, 3))
async def cancelled_reset_can_be_repeated(world: World) -> None:
    """Cancelling a reset that waits for the others leaves the group mendable: reset again."""
    waiting = asyncio.create_task(world.groups[0].reset())
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting])
    await world.reset()
    await works_again(world)


async def _reset(group: Group) -> None:
    await group.reset()
