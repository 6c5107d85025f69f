"""Calls that many checks make: one of each collective, and a proof that a group works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from collective.group import Group
from collective.layouts import Layout, Replicate, Shard
from collective.testing._arrays import check_array
from collective.testing._world import Each
from collective.types import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collective.testing._world import World
    from collective.work import Work


def collectives(x: np.ndarray) -> dict[str, Callable[[Group], Work[Any]]]:
    """Return a call of every collective but split; rank 0 is the root, and x has at least one dimension."""
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
        "repartition": lambda group: group.repartition(x, *_rows_to_all(x, group.size)),
    }


def _rows_to_all(x: np.ndarray, size: int) -> tuple[Layout, Layout]:
    shape = (size * len(x), *x.shape[1:])
    return Layout(shape, size, [Shard(0)]), Layout(shape, size, [Replicate()])


def unfinished(x: np.ndarray) -> dict[str, Callable[[Group], Work[Any]]]:
    """Return the collectives, and split, which leaves a group behind where it is finished."""
    return {**collectives(x), "split": lambda group: group.split(0)}


async def works_again(world: World) -> None:
    """Assert that the group of a world gives right values."""
    for result in await world.call(Group.allreduce, Each(np.array([rank, 1]) for rank in world.ranks)):
        check_array(result, np.array([sum(world.ranks), world.size]), "numpy")
    await check_ring(world.groups)


async def check_ring(groups: Sequence[Group]) -> None:
    """Assert that every rank of a group can send to its right neighbour."""
    size = len(groups)
    for group in groups:
        await group.send(np.array([group.rank]), (group.rank + 1) % size)
    for group in groups:
        left = (group.rank - 1) % size
        check_array(await group.recv(left), np.array([left]), "numpy")
