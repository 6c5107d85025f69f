"""Checks of how groups are formed, and of what they say of themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from collective.errors import PeerLost
from collective.testing._arrays import check_array
from collective.testing._cases import check
from collective.testing._world import outcome, outcomes, refused, turns

if TYPE_CHECKING:
    from collective.testing._world import World


@check(sizes=(4,), roles=(("reader", 1), ("trainer", 3)))
async def groups_describe_themselves(world: World) -> None:
    """Name, rank, size and the ranks of each role; a role that the group lacks is an error; repr hides secrets."""
    for rank, group in enumerate(world.groups):
        assert (group.name, group.rank, group.size) == ("group", rank, 4)
        assert group.ranks("reader") == [0]
        assert group.ranks("trainer") == [1, 2, 3]
        refused(ValueError, group.ranks, "nobody")
        assert "conformance conformance" not in repr(group)
    assert len({group.epoch for group in world.groups}) == 1


@check(sizes=(1, 2, 4))
async def forming_in_any_order(world: World) -> None:
    """Members may form several groups at the same time, each in an order of its own."""
    names = ["red", "green", "blue"]
    forming = {
        (name, rank): asyncio.create_task(world.join(name, rank))
        for rank in world.ranks
        for name in names[rank % 3 :] + names[: rank % 3]
    }
    for name in names:
        groups = [await forming[name, rank] for rank in world.ranks]
        for work in [group.allreduce(np.array([len(name)])) for group in groups]:
            check_array(await work, np.array([len(name) * world.size]), "numpy")


@check(sizes=(2, 3))
async def forming_waits_for_all(world: World) -> None:
    """Nobody has a group before all have come; who gives up waiting leaves nothing behind and can form another."""
    waiting = [asyncio.create_task(world.join("late", rank)) for rank in world.ranks[:-1]]
    await turns(50)
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    for work in [group.allreduce(np.ones(1)) for group in await world.form("again")]:
        check_array(await work, np.full(1, float(world.size)), "numpy")


@check(sizes=(2, 3, 4))
async def death_while_forming(world: World) -> None:
    """A member that dies while the others form a group with it: PeerLost, naming it, and no hang."""
    dead = world.size - 1
    waiting = [asyncio.create_task(world.join("never", rank)) for rank in world.ranks[:-1]]
    await turns()
    world.endpoints[dead].abort()
    waiting.append(asyncio.create_task(world.join("neither", 0)))
    async with asyncio.timeout(5):
        for error in await outcomes(waiting):
            assert isinstance(error, PeerLost), f"got {error!r}"
            assert (error.role, error.rank) == ("worker", dead), f"lost {error.role}[{error.rank}]"


@check(sizes=(1, 2))
async def unknown_backends_are_refused(world: World) -> None:
    """A backend that does not exist is a ValueError that names it."""
    for rank in world.ranks:
        error = await outcome(world.join("odd", rank, backend="carrier-pigeon"))
        assert isinstance(error, ValueError), f"got {error!r}"
        assert "carrier-pigeon" in str(error)
