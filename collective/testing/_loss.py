"""Checks of contract 8: members that die. A death is the abrupt end of a member's endpoint."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import GroupError, PeerLost
from collective.group import Group
from collective.testing._arrays import check_array
from collective.testing._calls import unfinished, works_again
from collective.testing._cases import check
from collective.testing._world import Each, attempt, outcome, outcomes, turns, world

if TYPE_CHECKING:
    from collective.testing._world import World
    from collective.work import Work


def _check_loss(error: Any, dead: int) -> None:
    assert isinstance(error, PeerLost), f"a survivor got {error!r}"
    assert (error.role, error.rank) == ("worker", dead), f"lost {error.role}[{error.rank}]"
    assert error.cause, "the cause is missing"
    assert f"worker[{dead}]" in str(error)
    assert error.cause in str(error)


@check(sizes=(2, 3, 4))
async def death_ends_what_is_pending(world: World) -> None:
    """When a member dies, pending and later Work on the survivors raises PeerLost, naming role, rank and cause."""
    dead = world.size - 1
    survivors = world.groups[:-1]
    calls = unfinished(np.ones(8))
    await works_again(world)
    pending = [call(group) for call in calls.values() for group in survivors]
    for group in survivors:
        pending += [group.recv(rank, tag=4) for rank in world.ranks]
        pending.append(group.send(np.ones(1_000_000), dead, tag=5))  # more than is ever buffered
    theirs = world.groups[dead].recv(0, tag=6)
    await turns()
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for error in await outcomes(pending):
            _check_loss(error, dead)
        for group in survivors:
            later = [attempt(call, group) for call in calls.values()]
            for rank in world.ranks:
                later += [attempt(group.recv, rank), attempt(group.send, np.ones(1), rank)]
            for error in await outcomes([*later, attempt(group.reset)]):
                _check_loss(error, dead)
    await world.groups[dead].aclose()
    assert isinstance(await outcome(theirs), Exception)


@check(sizes=(2, 3, 4))
async def death_reaches_the_idle(world: World) -> None:
    """Whoever dies, survivors that have nothing pending learn of it too, at their next call or before."""
    dead = world.size // 2
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for group in world.groups:
            if group.rank != dead:
                _check_loss(await outcome(attempt(group.barrier)), dead)


@check(sizes=(2, 3))
async def death_anywhere(opened: World) -> None:
    """A member that dies at any moment of any operation: the right result or PeerLost on the survivors, and no hang."""
    calls: list[tuple[str, int]] = []
    for length in (8, 200_000):
        calls += [(name, length) for name in (*unfinished(np.ones(1)), "send", "recv")]
    for number, (name, length) in enumerate(calls):
        async with world(opened.backend, opened.size, hosts=opened.hosts, link=opened.link) as doomed:
            try:
                await _die(doomed, name, length, delay=3 * (number % 7), dead=number % opened.size)
            except AssertionError as error:
                error.add_note(f"while rank {number % opened.size} died in {name} of {length} elements")
                raise
        assert not doomed.unseen, f"{name} left {doomed.unseen}"


async def _die(world: World, name: str, length: int, *, delay: int, dead: int) -> None:
    x = np.arange(length)
    survivors = [group for group in world.groups if group.rank != dead]
    last_words: list[Work[Any]] = []
    if name == "send":
        works = [group.send(x, dead) for group in survivors]
        last_words = [world.groups[dead].recv(group.rank) for group in survivors]
    elif name == "recv":
        last_words = [world.groups[dead].send(x, group.rank) for group in survivors]
        works = [group.recv(dead) for group in survivors]
    else:
        last_words = [unfinished(x)[name](world.groups[dead])]
        works = [unfinished(x)[name](group) for group in survivors]
    await turns(delay)
    world.endpoints[dead].abort()
    async with asyncio.timeout(10):
        for work in works:
            result = await outcome(work)
            if isinstance(result, Exception):
                _check_loss(result, dead)
            elif name == "allreduce":
                check_array(result, x * world.size, "numpy")
            elif name == "recv":
                check_array(result, x, "numpy")
        for group in survivors:
            _check_loss(await outcome(attempt(group.barrier)), dead)
        await world.groups[dead].aclose()
        await outcomes(last_words)


@check(sizes=(2, 3))
async def own_endpoint_ends_the_group(world: World) -> None:
    """A member whose own endpoint ends before its group does not hang either: pending and later Works raise."""
    mourner, quitter = world.groups[0], world.groups[1]
    pending = [quitter.allreduce(np.ones(1)), quitter.recv(0), quitter.recv(1), mourner.recv(1)]
    await turns()
    await world.endpoints[1].aclose()
    async with asyncio.timeout(5):
        for error in await outcomes([*pending, attempt(quitter.barrier), attempt(mourner.barrier)]):
            assert isinstance(error, GroupError), f"got {error!r}"


@check(sizes=(2, 3, 4))
async def death_during_reset(world: World) -> None:
    """A member that dies while the others wait for its reset: their resets raise PeerLost."""
    dead = world.size - 1
    waiting = [asyncio.create_task(group.reset()) for group in world.groups[:-1]]
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
    *subgroups, _ = await world.call(Group.split, Each(int(rank == dead) for rank in world.ranks))
    world.endpoints[dead].abort()
    async with asyncio.timeout(5):
        for group, subgroup in zip(world.groups, subgroups, strict=False):
            _check_loss(await outcome(attempt(group.barrier)), dead)
            error = await outcome(attempt(subgroup.barrier))
            assert isinstance(error, GroupError), f"the subgroup goes on with {error!r}"
