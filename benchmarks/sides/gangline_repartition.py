"""Ranks that move a tensor from one layout to another, a process each, on uvloop: by `repartition`, also
into the same arrays again, and by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.side import time_async_row
from benchmarks.sides.members import membership
from collective import Layout, Replicate, Shard

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.side import Turns
    from collective import Group
    from collective.types import Address

COLUMNS = 256


def main(turns: Turns) -> None:
    """Be a member."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    fewer: Any = None
    targets = 0

    async def form(addresses: list[Address], receiving: int) -> None:
        nonlocal fewer, targets
        targets = receiving
        await member.form(addresses)
        fewer = await member.group.split(0 if turns.rank <= targets else None)

    async def move(way: str, what: str, nbytes: int, count: int) -> list[float]:
        src, dst = layouts(what, nbytes, targets, member.group.size)
        issue = WAYS[way](member.group, fewer, src, dst)
        await member.group.barrier()
        return await time_async_row(issue, count)

    async with membership(turns.rank) as member:
        await turns.serve_async({"setup": member.address, "form": form, "move": move})


def layouts(what: str, nbytes: int, targets: int, size: int) -> tuple[Layout, Layout]:
    """Return where a tensor is, and where it shall be: ranks from `targets` on have it, those below get it."""
    shape = (nbytes // (4 * COLUMNS), COLUMNS)
    placement = {"rows": Shard(0), "columns": Shard(1), "all": Replicate()}[what]
    return Layout(shape, size - targets, [Shard(0)], range(targets, size)), Layout(shape, targets, [placement])


def repartition(group: Group, _: Group | None, src: Layout, dst: Layout) -> Callable[[], Awaitable[object]]:
    """Move it in one call."""
    part = held(group.rank, src)
    return lambda: group.repartition(part if group.rank in src.ranks else None, src, dst)


def into_out(group: Group, _: Group | None, src: Layout, dst: Layout) -> Callable[[], Awaitable[object]]:
    """Move it in one call, into the same arrays each time."""
    part = held(group.rank, src)
    out = np.zeros(dst.local_shape(group.rank), np.float32) if group.rank in dst.ranks else None
    return lambda: group.repartition(part if group.rank in src.ranks else None, src, dst, out=out)


def by_hand(group: Group, fewer: Group | None, src: Layout, dst: Layout) -> Callable[[], Awaitable[object]]:
    """Gather on the first who has some, broadcast to those who want it, and cut out."""
    part = held(group.rank, src)
    root = src.ranks[0]

    async def move() -> object:
        parts = await group.gather(part, root)
        if fewer is None:
            return None
        whole = None if parts is None else np.concatenate(parts[root:])
        whole = await fewer.broadcast(whole, fewer.size - 1)
        return np.ascontiguousarray(dst.local(group.rank, whole)) if group.rank in dst.ranks else None

    return move


WAYS = {"repartition": repartition, "into out": into_out, "by hand": by_hand}


def held(rank: int, src: Layout) -> np.ndarray:
    """Return what a rank has of it."""
    return np.ones(src.local_shape(rank) if rank in src.ranks else (0, COLUMNS), np.float32)
