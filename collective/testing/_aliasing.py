"""Checks of contract 4: who may change what, and who shares memory with whom."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from collective.group import Group
from collective.testing._arrays import bits, check_array, dtype_of, overlap, sample, values_of
from collective.testing._cases import MIXES, check
from collective.testing._outputs import OPERATIONS, expected
from collective.testing._world import Each

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collective.testing._arrays import Array
    from collective.testing._outputs import Operation
    from collective.testing._world import World


@check(mixes=MIXES)
async def inputs_stay_and_are_free_once_done(world: World) -> None:
    """An operation leaves its inputs as they were; changing one as soon as its own Work is done changes no result."""
    for length in (1, 1000, 100_000):
        parts = [sample((length, 2), "float32", rank) for rank in world.ranks]
        for name, operation in OPERATIONS.items():
            inputs = world.spread(parts)
            results = await world.each(partial(_use_and_wipe, operation=operation, inputs=inputs))
            for rank, (result, part) in enumerate(zip(results, expected(name, parts), strict=True)):
                source = {"broadcast": world.size - 1, "recv": rank - 1}.get(name, rank)
                if part is not None:
                    check_array(result, part, world.kinds[source])


@check(mixes=("numpy", "torch"))
async def memory_of_the_group_is_like_any_other(world: World) -> None:
    """Inputs in memory that `empty` gave, on all members or on some, are read right, and are free once done."""
    for length in (0, 1, 5000, 400_000):
        parts = [sample((length, 2), "float32", rank) for rank in world.ranks]
        for takers in (world.ranks, world.ranks[-1:]):
            for name, operation in OPERATIONS.items():
                inputs = world.spread(parts)
                for rank in takers:
                    plain, inputs[rank] = inputs[rank], world.groups[rank].empty((length, 2), inputs[rank].dtype)
                    inputs[rank][...] = plain
                results = await world.each(partial(_use_and_wipe, operation=operation, inputs=inputs))
                for rank, (result, part) in enumerate(zip(results, expected(name, parts), strict=True)):
                    if part is not None:
                        check_array(result, part, world.kinds[rank])


async def _use_and_wipe(group: Group, operation: Operation, inputs: Each) -> Any:
    mine = inputs[group.rank]
    before = bits(mine)
    result = await operation(group, mine, None)
    assert bits(mine) == before, f"rank {group.rank} lost its input"
    if operation is not OPERATIONS["recv"]:  # there, it is the send's Work that tells
        mine[...] = 0
    return result


@check(mixes=MIXES)
async def results_share_memory_with_nobody(world: World) -> None:
    """A result overlaps no input and no other member's result, whatever the size; it can be written to."""
    for length in (1, 1000, 50_000):
        parts = [sample((length, 2), "float64", rank) for rank in world.ranks]
        for name, operation in OPERATIONS.items():
            inputs = world.spread(parts)
            _check_apart(name, await world.call(operation, inputs, None), inputs)
        rows = Each(list(world.spread([part] * world.size)) for part in parts)
        exchanged = await world.call(Group.alltoall, rows)
        _check_apart("alltoall", chain.from_iterable(exchanged), chain.from_iterable(rows))
        inputs = world.spread(parts)
        _check_apart("gather", (await world.call(Group.gather, inputs, 0))[0], inputs)
        _check_apart("scatter", await world.call(Group.scatter, world.only(0, list(inputs)), 0), inputs)


def _check_apart(name: str, results: Iterable[Array], inputs: Iterable[Array]) -> None:
    arrays = [result for result in results if result is not None]
    others = list(inputs)
    for number, result in enumerate(arrays):
        assert not any(overlap(result, other) for other in others), f"{name}: result {number} shares memory"
        assert values_of(result).flags.writeable, f"{name}: result {number} is read-only"
        result[...] = 1
        others.append(result)


@check(sizes=(2, 3))
async def small_sends_are_copied(world: World) -> None:
    """A send of up to 64 KiB is done without a recv; changing its tensor then changes nothing that arrives."""
    sender, receiver = world.groups[0], world.groups[-1]
    for nbytes in (0, 1, 1 << 10, 64 << 10):
        values = np.full(nbytes, 7, dtype_of("uint8"))
        await sender.send(values, receiver.rank)
        values[...] = 0
        check_array(await receiver.recv(0), np.full(nbytes, 7, np.uint8), "numpy")


@check(sizes=(1, 2, 3))
async def large_sends_are_free_once_done(world: World) -> None:
    """A send of several MiB may wait for its recv; when it is done its tensor may be changed."""
    sender, receiver = world.groups[0], world.groups[-1]
    values = sample((3 << 18,), "float64", 3)
    kept = values.copy()
    sending = sender.send(values, receiver.rank)
    receiving = receiver.recv(0)
    await sending
    values[...] = 0
    check_array(await receiving, kept, "numpy")
