"""Checks of contracts 7 and 8: calls that end in mid-collective, resets, and members that die."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import GroupBroken, GroupError, PeerLost
from collective.group import Group
from collective.scopes import CallScope
from collective.testing._arrays import check_array
from collective.testing._cases import check
from collective.testing._errors import works_again
from collective.testing._world import attempt, outcome, outcomes, turns
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from collective.testing._world import World
    from collective.work import Work

    Issue: TypeAlias = Callable[[Group], Work[Any]]


def _collectives(length: int) -> dict[str, Issue]:
    x = np.ones((length, 2))
    return {
        "allreduce": lambda group: group.allreduce(x),
        "reduce": lambda group: group.reduce(x, 0, ReduceOp.MAX),
        "reduce_scatter": lambda group: group.reduce_scatter(x),
        "allgather": lambda group: group.allgather(x),
        "broadcast": lambda group: group.broadcast(x if group.rank == 0 else None, 0),
        "gather": lambda group: group.gather(x, 0),
        "scatter": lambda group: group.scatter([x] * group.size if group.rank == 0 else None, 0),
        "alltoall": lambda group: group.alltoall([x] * group.size),
        "barrier": lambda group: group.barrier(),
        "split": lambda group: group.split(0),
    }


@check(sizes=(2, 3, 4))
async def abandoned_calls_break_the_group(world: World) -> None:
    """A call that ends with an unfinished collective breaks the group on all, naming rank, operation and line."""
    for rank in world.ranks:
        for name, issue in _collectives(8).items():
            with CallScope() as scope:
                left = issue(world.groups[rank])
            waiting = [group.recv(rank, tag=9) for group in world.groups if group.rank != rank]
            await turns()
            scope.abandon("it was cancelled")
            for error in await outcomes([left, *waiting]):
                assert isinstance(error, GroupBroken), f"{name} left by rank {rank} gave {error!r}"
                for part in (f"rank {rank}", world.member(rank), name, "_breaking.py:", "it was cancelled"):
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
                asyncio.create_task(_step(group, CallScope(), array))
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
            for result in await world.each(partial(_step, scope=CallScope(), array=-array)):
                check_array(result, -array * world.size, "numpy")


async def _step(group: Group, scope: CallScope, array: np.ndarray) -> Any:
    """What an actor's method does, and what the call layer does about it."""
    with scope:
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
        large = world.groups[0].send(np.ones(100_000), receiver.rank, tag=3)
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
    waiting = asyncio.create_task(_reset(world.groups[0]))
    await turns()
    waiting.cancel()
    await asyncio.wait([waiting])
    await world.reset()
    await works_again(world)


async def _reset(group: Group) -> None:
    await group.reset()


@check(sizes=(2, 3, 4))
async def death_ends_what_is_pending(world: World) -> None:
    """When a member dies, pending and later Work on the survivors raises PeerLost, naming role, rank and cause."""
    dead = world.size - 1
    survivors = world.groups[:-1]
    await works_again(world)
    pending: list[Work[Any]] = []
    for issue in _collectives(8).values():
        pending += [issue(group) for group in survivors]
    for group in survivors:
        pending += [group.recv(rank, tag=4) for rank in world.ranks]
        pending.append(group.send(np.ones(100_000), dead, tag=5))
    theirs = [world.groups[dead].recv(0, tag=6)]
    await turns()
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for error in await outcomes(pending):
            _check_loss(error, dead)
        for group in survivors:
            for issue in _collectives(8).values():
                _check_loss(await outcome(attempt(issue, group)), dead)
            for rank in world.ranks:
                _check_loss(await outcome(attempt(group.recv, rank)), dead)
                _check_loss(await outcome(attempt(group.send, np.ones(1), rank)), dead)
            _check_loss(await outcome(attempt(group.reset)), dead)
    await world.groups[dead].aclose()
    for error in await outcomes(theirs):
        assert isinstance(error, Exception)


def _check_loss(error: Any, dead: int) -> None:
    assert isinstance(error, PeerLost), f"a survivor got {error!r}"
    assert (error.role, error.rank) == ("worker", dead), f"lost {error.role}[{error.rank}]"
    assert error.cause, "the cause is missing"
    assert f"worker[{dead}]" in str(error)
    assert error.cause in str(error)


@check(sizes=(3, 4))
async def death_of_any_member_reaches_all(world: World) -> None:
    """Whoever dies, idle survivors that never spoke to it learn of it too, at their next call or before."""
    dead = world.size // 2
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for group in world.groups:
            if group.rank != dead:
                _check_loss(await outcome(attempt(group.barrier)), dead)


def _death_at(delay: int) -> Callable[[World], Any]:
    async def body(world: World) -> None:
        x = np.ones(1 << (17 if delay % 2 else 4))
        dead = delay % world.size
        theirs, survivors = world.groups[dead], [group for group in world.groups if group.rank != dead]
        last_words = theirs.allreduce(x)
        works = [group.allreduce(x) for group in survivors]
        sending = [group.send(x, dead) for group in survivors]
        await turns(delay)
        world.endpoints[dead].abort()
        async with asyncio.timeout(10):
            for result in await outcomes(works):
                if isinstance(result, PeerLost):
                    _check_loss(result, dead)
                else:
                    check_array(result, x * world.size, "numpy")
            for result in await outcomes(sending):
                assert result is None or isinstance(result, PeerLost), f"a send gave {result!r}"
            for group in survivors:
                _check_loss(await outcome(attempt(group.barrier)), dead)
        await theirs.aclose()
        await outcome(last_words)

    body.__name__ = f"death_after_{delay}_turns"
    body.__doc__ = f"A member that dies {delay} turns of the loop into an allreduce: a right result or PeerLost."
    return body


death_early = check(sizes=(2, 3))(_death_at(2))
death_while_agreeing = check(sizes=(2, 3))(_death_at(7))
death_while_moving = check(sizes=(2, 3))(_death_at(12))
death_late = check(sizes=(2, 3))(_death_at(25))


@check(sizes=(2, 3))
async def own_endpoint_ends_the_group(world: World) -> None:
    """A member whose own endpoint closes before the group does not hang either: pending and later Works raise."""
    for end in (world.endpoints[0].aclose, world.endpoints[1].aclose):
        group = world.groups[0] if end is world.endpoints[0].aclose else world.groups[1]
        pending: list[Work[Any]] = [group.allreduce(np.ones(1)), group.recv(0), group.recv(1)]
        await turns()
        await end()
        async with asyncio.timeout(5):
            for error in await outcomes([*pending, attempt(group.barrier)]):
                assert isinstance(error, Exception), f"got {error!r}"


@check(sizes=(2, 3, 4))
async def death_during_reset(world: World) -> None:
    """A member that dies while the others wait for its reset: their resets raise PeerLost."""
    dead = world.size - 1
    waiting = [asyncio.create_task(_reset(group)) for group in world.groups[:-1]]
    await turns()
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        await asyncio.wait(waiting)
    for task in waiting:
        _check_loss(task.exception(), dead)


@check(sizes=(2, 3, 4))
async def death_ends_subgroups(world: World) -> None:
    """The death of a member of the parent ends its subgroups, also those that it was no member of."""
    dead = world.size - 1
    works = [group.split(0 if group.rank != dead else 1) for group in world.groups]
    subgroups = [await work for work in works]
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for group in world.groups[:-1]:
            _check_loss(await outcome(attempt(group.barrier)), dead)
        for subgroup in subgroups[:-1]:
            assert subgroup is not None
            error = await outcome(attempt(subgroup.barrier))
            assert isinstance(error, GroupError), f"the subgroup goes on with {error!r}"
