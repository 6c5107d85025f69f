"""Checks of `split`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from collective.errors import CollectiveMismatch, GroupClosed, GroupError
from collective.group import Group
from collective.scopes import CallScope
from collective.testing._arrays import check_array
from collective.testing._calls import check_ring
from collective.testing._cases import check
from collective.testing._world import attempt, outcome, outcomes, refused, turns, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.testing._world import World


@check()
async def split_by_color(world: World) -> None:
    """Members of one color form a group, in the order of (key, rank); color None gets None."""
    everybody: list[list[int | None]] = [[0] * world.size, [None] * world.size]
    each_its_own: list[list[int | None]] = [[*world.ranks], [*world.only(0, 5)], [rank % 2 for rank in world.ranks]]
    for colors in everybody + each_its_own:
        for keys in ([0] * world.size, [-rank for rank in world.ranks], [rank % 2 for rank in world.ranks]):
            subgroups = await _split(world.groups, colors, keys)
            for rank, subgroup in enumerate(subgroups):
                color = colors[rank]
                if color is None:
                    assert subgroup is None, f"color None gave rank {rank} {subgroup!r}"
                    continue
                assert subgroup is not None
                members = sorted((keys[other], other) for other in world.ranks if colors[other] == color)
                ranks = [other for _, other in members]
                assert (subgroup.rank, subgroup.size) == (ranks.index(rank), len(ranks))
            for color in {color for color in colors if color is not None}:
                await _try_out([group for rank, group in enumerate(subgroups) if colors[rank] == color])
    await world.call(Group.barrier)


async def _split(
    groups: Sequence[Group], colors: Sequence[int | None], keys: Sequence[int] | None = None
) -> list[Group | None]:
    keys = keys or [0] * len(groups)
    works = [group.split(color, key) for group, color, key in zip(groups, colors, keys, strict=True)]
    return [await work for work in works]


async def _copy(groups: Sequence[Group]) -> list[Group]:
    """Split off a group of the same members."""
    return [group for group in await _split(groups, [0] * len(groups)) if group is not None]


async def _try_out(groups: Sequence[Group | None]) -> None:
    """Run a collective and a ring of sends in a subgroup."""
    present = sorted((group for group in groups if group is not None), key=lambda group: group.rank)
    size = len(present)
    works = [group.allgather(np.array([10 * group.rank])) for group in present]
    for work in works:
        check_array(await work, np.arange(size) * 10, "numpy")
    await check_ring(present)


@check(sizes=(4,), roles=(("reader", 2), ("trainer", 2)))
async def subgroups_know_roles(world: World) -> None:
    """The ranks of a role in a subgroup are the subgroup's own."""
    subgroups = await _split(world.groups, [rank % 2 for rank in world.ranks], [-rank for rank in world.ranks])
    for subgroup in subgroups:
        assert subgroup is not None
        assert subgroup.ranks("trainer") == [0]
        assert subgroup.ranks("reader") == [1]


@check(sizes=(4,))
async def split_nests(world: World) -> None:
    """A subgroup splits like any group, and works beside its parents."""
    halves = await _split(world.groups, [0, 0, 1, 1])
    singles: list[Group | None] = []
    for pair in (halves[:2], halves[2:]):
        present = [group for group in pair if group is not None]
        singles += await _split(present, [0, 1])
        again = await _split(present, [7, 7], [1, 0])
        await _try_out(again)
    for single in singles:
        await _try_out([single])
    await _try_out(halves[:2])
    await _try_out(halves[2:])
    await _try_out(world.groups)


@check(sizes=(1, 2, 3))
async def split_takes_its_place(world: World) -> None:
    """A split is ordered among the collectives around it; several may be in flight at once."""
    before = [group.allreduce(np.ones(2)) for group in world.groups]
    splits = [[group.split(color) for group in world.groups] for color in (3, 3, 4)]
    after = [group.allreduce(np.ones(2)) for group in world.groups]
    for work in (*before, *after):
        check_array(await work, np.full(2, float(world.size)), "numpy")
    for works in splits:
        await _try_out([await work for work in works])


@check(sizes=(1, 2, 3))
async def subgroups_close_alone(world: World) -> None:
    """Closing a subgroup leaves its parent and its siblings at work."""
    closing = await _copy(world.groups)
    staying = await _copy(world.groups)
    for group in closing:
        await group.aclose()
        refused(GroupClosed, group.barrier)
    await _try_out(staying)
    await _try_out(world.groups)


@check(sizes=(1, 2, 3, 4))
async def subgroups_die_with_the_epoch(world: World) -> None:
    """After its parent was reset, a subgroup raises on every member; a new split works."""
    for _ in range(2):
        subgroups = await _copy(world.groups)
        await _try_out(subgroups)
        pending = subgroups[0].barrier() if world.size > 1 else None
        await world.reset()
        for group in subgroups:
            error = await outcome(attempt(group.barrier))
            assert isinstance(error, GroupError), f"a subgroup of an ended epoch gave {error!r}"
        if pending is not None:
            assert isinstance(await outcome(pending), GroupError)
        await _try_out(await _copy(world.groups))
        await _try_out(world.groups)


@check(sizes=(1, 2, 3))
async def subgroups_close_with_their_parent(world: World) -> None:
    """A member that closes the parent cannot use its subgroup any more."""
    subgroups = await _copy(world.groups)
    for group in world.groups:
        await group.aclose()
    for group in subgroups:
        error = await outcome(attempt(group.barrier))
        assert isinstance(error, GroupError), f"a subgroup of a closed group gave {error!r}"


@check(sizes=(2, 3, 4))
async def trouble_in_a_subgroup_stays_there(world: World) -> None:
    """A mismatch in a subgroup breaks neither its parent nor its siblings, and its own reset mends it."""
    one = await _copy(world.groups)
    other = await _copy(world.groups)
    works = [group.allreduce(np.ones(1 + group.rank)) for group in one]
    for error in await outcomes(works):
        assert isinstance(error, CollectiveMismatch), f"got {error!r}"
    await _try_out(other)
    await _try_out(world.groups)
    async with asyncio.TaskGroup() as tasks:
        for group in one:
            tasks.create_task(group.reset())
    await _try_out(one)


@check(sizes=(1, 2))
async def bad_split_is_refused(world: World) -> None:
    """A color or key that is no int raises at the call."""
    for color, key in (("red", 0), (0, "first"), (1.5, 0)):
        for group in world.groups:
            refused(TypeError, group.split, color, key)
        await world.reset()


@check(sizes=(2, 3))
async def a_split_that_is_given_up_at_once_ends(world: World) -> None:
    """A split of a call that ends in the turn in which it was called ends as well."""
    with CallScope() as scope:
        work = world.groups[0].split(0)
        scope.abandon("its call failed")
    assert isinstance(await outcome(work), GroupError)
    await world.reset()


@check(sizes=(2, 3))
async def unfinished_split_ends_with_the_group(world: World) -> None:
    """A split that not all have called ends with an error when its caller closes the group."""
    work = world.groups[0].split(0)
    await turns()
    assert not work.done()
    await world.groups[0].aclose()
    await until(work.done)
    assert isinstance(work.exception(), GroupError)
