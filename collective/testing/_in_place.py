"""Checks of `out=` where it is several arrays, or lies in the input, or the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from collective.errors import CollectiveMismatch, GroupBroken
from collective.group import Group
from collective.testing._arrays import check_array, sample
from collective.testing._calls import works_again
from collective.testing._cases import MIXES, check
from collective.testing._oracle import cut, reduced
from collective.testing._world import Each, attempt, issue, outcomes, refused
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collective.testing._arrays import Array
    from collective.testing._world import World


def _check_all(arrays: Sequence[Array], values: Sequence[np.ndarray], kind: str) -> None:
    for array, value in zip(arrays, values, strict=True):
        check_array(array, value, kind)


@check(mixes=MIXES)
async def exchanges_fill_their_outs(world: World) -> None:
    """gather, scatter and alltoall fill what `out` has for each tensor, of any shape, dtype and form, and return it."""
    last = world.size - 1
    for form in ("contiguous", "strided"):
        for dtype in ("bool", "bfloat16", "float64"):
            values = [[sample((1 + 3 * src, 2 + dst), dtype, src + dst) for dst in world.ranks] for src in world.ranks]
            given = Each([world.make(src, part, form) for part in row] for src, row in enumerate(values))
            outs = Each([world.make(dst, np.zeros_like(row[dst]), form) for row in values] for dst in world.ranks)
            results = await world.call(Group.alltoall, given, out=outs)
            for dst in world.ranks:
                assert results[dst] is outs[dst], "alltoall returned another list than out"
                _check_all(outs[dst], [row[dst] for row in values], world.kinds[dst])

            firsts = [row[0] for row in values]
            room = tuple(world.make(last, np.zeros_like(part), form) for part in firsts)
            results = await world.call(Group.gather, Each(row[0] for row in given), last, out=world.only(last, room))
            assert results[:last] == [None] * last
            assert all(one is other for one, other in zip(results[last], room, strict=True)), "gather made new arrays"
            _check_all(room, firsts, world.kinds[last])

            outs = Each(world.make(dst, np.zeros_like(part), form) for dst, part in enumerate(values[last]))
            results = await world.call(Group.scatter, world.only(last, given[last]), last, out=outs)
            for dst in world.ranks:
                assert results[dst] is outs[dst], "scatter returned another array than out"
                check_array(outs[dst], values[last][dst], world.kinds[dst])


@check(mixes=MIXES)
async def exchanges_in_place(world: World) -> None:
    """What comes may land in the very arrays of what goes, in any order: nothing is sent after it was written to."""
    for length in (3, 600_000):
        values = [[sample((length,), "float32", 10 * src + dst) for dst in world.ranks] for src in world.ranks]
        for shift in (0, 1):
            given = Each([world.make(src, part) for part in row] for src, row in enumerate(values))
            outs = Each([*row[shift:], *row[:shift]] for row in given)
            await world.call(Group.alltoall, given, out=outs)
            for dst in world.ranks:
                _check_all(outs[dst], [row[dst] for row in values], world.kinds[dst])
        room = [world.make(0, part) for part in values[0]]
        given = Each([room[0], *(world.make(rank, values[0][rank]) for rank in world.ranks[1:])])
        await world.call(Group.gather, given, 0, out=world.only(0, room))
        _check_all(room, values[0], world.kinds[0])
        outs = Each([room[0], *(world.make(rank, np.zeros_like(values[0][rank])) for rank in world.ranks[1:])])
        await world.call(Group.scatter, world.only(0, room), 0, out=outs)
        for rank in world.ranks:
            check_array(outs[rank], values[0][rank], world.kinds[rank])


@check(mixes=MIXES)
async def own_parts_in_place(world: World) -> None:
    """An allgather's input may be its own part of `out`, and a reduce_scatter's `out` its own part of the input."""
    for rows in (0, 2, 400_000):
        counts = [rows + rank for rank in world.ranks]
        starts = [sum(counts[:rank]) for rank in world.ranks]
        own = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        whole = sample((sum(counts), 2), "int64", 1)
        for form in ("contiguous", "strided"):
            # Each rank's own part is there, and nothing else.
            outs = Each(world.make(rank, _only(whole, own[rank]), form) for rank in world.ranks)
            parts = Each(out[mine] for out, mine in zip(outs, own, strict=True))
            results = await world.call(Group.allgather, parts, out=outs)
            for rank in world.ranks:
                assert results[rank] is outs[rank]
                check_array(outs[rank], whole, world.kinds[rank])

            inputs = [sample((sum(counts), 2), "int64", rank) for rank in world.ranks]
            tensors = world.spread(inputs, form)
            outs = Each(tensor[mine] for tensor, mine in zip(tensors, own, strict=True))
            results = await world.call(Group.reduce_scatter, tensors, splits=counts, out=outs)
            sums = cut(reduced(inputs, ReduceOp.SUM), counts)
            for rank in world.ranks:
                assert results[rank] is outs[rank]
                after = inputs[rank].copy()
                after[own[rank]] = sums[rank]
                check_array(tensors[rank], after, world.kinds[rank])


def _only(whole: np.ndarray, part: slice) -> np.ndarray:
    array = np.zeros_like(whole)
    array[part] = whole[part]
    return array


@check(sizes=(2, 3), mixes=("numpy", "torch"))
async def other_parts_are_refused(world: World) -> None:
    """An `out` in which the input lies anywhere else is refused at the call, or by all where only all can tell."""
    group, size = world.groups[-1], world.size
    room = world.make(group.rank, np.zeros((2 * size + 1, 2)))
    flat = world.make(group.rank, np.zeros(8 * size))
    for call in (
        lambda: group.reduce_scatter(room[: 2 * size], out=room[:2]),
        lambda: group.reduce_scatter(room[: 2 * size], out=room[2 * size - 1 :]),
        lambda: group.allgather(flat[1:3], out=flat[::2]),
        lambda: group.alltoall([flat[:3]] * size, out=[flat[1:4], *(flat[8 + 3 * n :][:3] for n in range(size - 1))]),
        lambda: group.alltoall([room] * size, out=[flat[:4]] * size),
        lambda: group.gather(flat[:3], group.rank, out=[flat[2:5]] * size),
        lambda: group.scatter([flat[:3]] * size, group.rank, out=flat[1:4]),
    ):
        error = refused(ValueError, call)
        assert "overlap" in str(error), f"{error}"
        await world.reset()
    parts = Each(world.make(rank, np.zeros((2 * size, 2)))[:2] for rank in world.ranks)
    outs = Each(world.make(rank, np.zeros((2 * size, 2))) for rank in world.ranks)
    parts[1] = outs[1][:2]  # where the part of rank 0 belongs
    await _see_mismatch(world, Group.allgather, parts, out=outs)
    await works_again(world)


@check(sizes=(1, 2, 3), mixes=("numpy", "torch"))
async def outs_that_do_not_fit_exchanges(world: World) -> None:
    """Of gather, scatter and alltoall, an `out` of another shape or dtype is a mismatch for all; one of another kind,
    number or library, or on a rank that gets nothing, is refused at the call."""
    last, size = world.size - 1, world.size
    group = world.groups[last]
    x, longer = np.zeros((2, 2)), np.zeros((3, 2))
    good = [world.make(last, x) for _ in world.ranks]
    for bad in (longer, x.astype(np.float32), x.reshape(4)):
        outs = world.only(last, [*good[1:], world.make(last, bad)])
        given = Each([world.make(rank, x) for _ in world.ranks] for rank in world.ranks)
        await _see_mismatch(world, Group.alltoall, given, out=outs)
        await _see_mismatch(world, Group.gather, Each(row[0] for row in given), last, out=outs)
        out = world.only(last, world.make(last, bad))
        await _see_mismatch(world, Group.scatter, world.only(0, given[0]), 0, out=out)
    read_only = np.broadcast_to(np.zeros(1), (2, 2))
    other: Any = _of_other_library(world, x)
    wrong: list[Any] = [good[0], good[:-1], [*good, good[0]], [*good[1:], [1.0]], [*good[1:], None], [*good[1:], other]]
    if world.kinds[last] == "numpy":
        wrong.append([*good[1:], read_only])
    for bad in wrong:
        for call in (
            lambda bad=bad: group.alltoall(good, out=bad),
            lambda bad=bad: group.gather(good[0], last, out=bad),
        ):
            error = attempt(call)
            assert isinstance(error, ValueError | TypeError), f"out={bad} gave {error!r}"
            await world.reset()
    if size > 1:
        refused(ValueError, group.gather, good[0], 0, out=good)
        await world.reset()
    await works_again(world)


def _of_other_library(world: World, values: np.ndarray) -> Any:
    import torch

    return values if world.kinds[-1] == "torch" else torch.from_numpy(values)


async def _see_mismatch(world: World, operation: Any, *args: Any, **options: Any) -> None:
    """Assert that nobody succeeds, then mend the group; the last rank, which errs, may be refused at the call."""
    works = [attempt(issue, operation, group, *args, **options) for group in world.groups]
    *others, mine = await outcomes(works)
    for rank, error in enumerate(others):
        assert isinstance(error, CollectiveMismatch), f"rank {rank} got {error!r}"
    assert isinstance(mine, CollectiveMismatch | GroupBroken | ValueError | TypeError), f"the erring rank got {mine!r}"
    await world.reset()
