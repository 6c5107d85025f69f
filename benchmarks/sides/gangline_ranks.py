"""Members of a group on "shm", a process each, on uvloop."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.operations import lengths
from benchmarks.side import time_async_row
from benchmarks.sides.members import membership

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.side import Turns
    from collective import Group

BEAT = 1e-3


def main(turns: Turns) -> None:
    """Be a member."""
    uvloop.run(serve(turns))


async def serve(turns: Turns) -> None:
    kept: dict[tuple[Any, ...], Callable[[], Awaitable[object]]] = {}

    async def collective(operation: str, nbytes: int, arrays: str, count: int) -> list[float]:
        if (operation, nbytes, arrays) not in kept:
            drop_other_sizes(kept, nbytes)
            kept[operation, nbytes, arrays] = prepare(member.group, operation, nbytes, arrays)
        await member.group.barrier()
        return await time_async_row(kept[operation, nbytes, arrays], count)

    async def stall(nbytes: int, runs: int) -> list[float]:
        kept.clear()
        issue = prepare(member.group, "allreduce", nbytes, "out")
        await issue()
        return [await longest_gap(member.group, issue) for _ in range(runs)]

    async def mixed(operations: int, seed: int) -> tuple[float, float]:
        kept.clear()
        await mix(member.group, operations, seed)
        await member.group.barrier()
        gc.collect()
        return resident()

    async with membership(turns.rank) as member:
        address, form = member.address, member.form
        try:
            await turns.serve_async(
                {"setup": address, "form": form, "collective": collective, "stall": stall, "mixed": mixed}
            )
        finally:
            kept.clear()


def drop_other_sizes(kept: dict[tuple[Any, ...], Any], nbytes: int) -> None:
    """Free the arrays of sizes that are done with."""
    for key in [key for key in kept if key[1] != nbytes]:
        del kept[key]


def prepare(group: Group, operation: str, nbytes: int, arrays: str) -> Callable[[], Awaitable[object]]:
    """Return an operation with its arrays ready: plain ones ("out"), an input of `group.empty`, or no `out`."""
    given, got = lengths(operation, nbytes, group.size)
    if arrays == "empty":
        source = group.empty((given,), np.float32)
        source[:] = 1
    else:
        source = np.ones(given, np.float32)
    issue = getattr(group, operation)
    if arrays == "fresh":
        return lambda: issue(source)
    out = np.ones(got, np.float32)
    return lambda: issue(source, out=out)


async def longest_gap(group: Group, issue: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time between two beats on the loop while an operation ran, less what a beat waits."""
    await group.barrier()
    gaps = [0.0]

    async def beat() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(BEAT)
            now = time.perf_counter()
            gaps.append(now - last - BEAT)
            last = now

    task = asyncio.create_task(beat())
    await asyncio.sleep(5 * BEAT)
    await issue()
    await asyncio.sleep(2 * BEAT)
    task.cancel()
    return max(gaps)


async def mix(group: Group, operations: int, seed: int) -> None:
    """Do operations of all kinds and of many sizes, the same on every member."""
    random = np.random.default_rng(seed)
    for _ in range(operations):
        length = int(2 ** random.uniform(0, 18))  # up to 1 MiB of float32
        await one(group, int(random.integers(8)), np.ones(length * group.size, np.float32), length)


async def one(group: Group, kind: int, array: np.ndarray, length: int) -> None:
    """Do one operation of a kind."""
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    parts = np.split(array, group.size)
    match kind:
        case 0:
            await group.allreduce(array)
        case 1:
            await group.allgather(array[:length])
        case 2:
            await group.reduce_scatter(array)
        case 3:
            await group.broadcast(array if group.rank == 0 else None, 0)
        case 4:
            await group.alltoall(parts)
        case 5:
            await asyncio.gather(group.send(array, following), group.recv(before))
        case 6:
            await group.scatter(parts if group.rank == 0 else None, 0)
        case _:
            await group.gather(array, 0)


def resident() -> tuple[float, float]:
    """Return the resident memory in MiB: shared pages shared out among those that map them, and counted whole."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) / 1024
    return fields["Pss"], fields["Rss"]
