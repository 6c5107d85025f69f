"""What it costs to move tensors that 4 ranks hold sharded to 2 others that hold them otherwise, between processes.

On a group on "shm", against what is done without `repartition`: the 4 gather on one of them, which broadcasts to the 2,
who cut out their parts. A sample is one operation on the slower of the two who receive, in a row of several.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.report import Comparison
from collective import GroupSpec, Layout, Replicate, Shard
from collective.formation import form_group
from collective.links import open_endpoint
from collective.types import Credential, Member

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from multiprocessing.connection import Connection

    from collective import Group
    from collective.types import Address

REPEAT = 7
SOURCES, TARGETS = 4, 2
ROWS = {64 << 10: 50, 1 << 20: 20, 16 << 20: 5, 128 << 20: 1}
"""Bytes of the whole tensor; operations in a row."""
CREDENTIAL = Credential("benchmark", b"benchmark benchmark benchmark benchmark")


def cases(nbytes: int) -> dict[str, tuple[Layout, Layout]]:
    """Return what is moved."""
    shape = (256, nbytes // 1024)
    rows = Layout(shape, SOURCES, [Shard(0)])
    to = range(SOURCES, SOURCES + TARGETS)
    return {
        "rows to rows": (rows, Layout(shape, TARGETS, [Shard(0)], to)),
        "rows to columns": (rows, Layout(shape, TARGETS, [Shard(1)], to)),
        "rows to all": (rows, Layout(shape, TARGETS, [Replicate()], to)),
    }


def goal(nbytes: int) -> float:
    """Return what the ratio to gathering and broadcasting may be."""
    return 1.0 if nbytes >= 1 << 20 else 1.5


def sides(
    group: Group, fewer: Group | None, src: Layout, dst: Layout
) -> tuple[Callable[[], Awaitable[Any]], Callable[[], Awaitable[Any]]]:
    """Return both ways to do it; `fewer` is the group of the one that gathers and of those who receive."""
    rank = group.rank
    part = np.ones(src.local_shape(rank), np.float32) if rank < SOURCES else np.empty((0, src.shape[1]), np.float32)

    async def ours() -> Any:
        return await group.repartition(part if rank < SOURCES else None, src, dst)

    async def theirs() -> Any:
        parts = await group.gather(part, 0)
        if fewer is None:
            return None
        whole = await fewer.broadcast(None if parts is None else np.concatenate(parts), 0)
        return np.ascontiguousarray(dst.local(rank, whole)) if rank >= SOURCES else None

    return ours, theirs


async def run_member(rank: int, pipe: Connection, repeat: int) -> None:
    """Measure as one member; those who receive send the samples of both sides by case and size."""
    endpoint = await open_endpoint(kinds=("shm", "unix"))
    endpoint.grant(CREDENTIAL)
    pipe.send(endpoint.address)
    addresses: list[Address] = await asyncio.to_thread(pipe.recv)
    members = [Member("member", rank, address) for rank, address in enumerate(addresses)]
    spec = GroupSpec("group", ("member",), backend="shm")
    group = await form_group(endpoint, spec, members, rank, key="benchmark", credential=CREDENTIAL)
    fewer = await group.split(0 if rank in (0, *range(SOURCES, SOURCES + TARGETS)) else None)
    samples: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for nbytes, row in ROWS.items():
        for what, (src, dst) in cases(nbytes).items():
            both: tuple[list[float], list[float]] = ([], [])
            samples[what, nbytes] = both
            ways = sides(group, fewer, src, dst)
            for way in ways:
                await way()
            for number in range(repeat):
                for side in (0, 1) if number % 2 else (1, 0):
                    await group.barrier()
                    for _ in range(row):
                        start = time.perf_counter()
                        await ways[side]()
                        both[side].append(time.perf_counter() - start)
    await group.aclose()
    await endpoint.aclose()
    if rank >= SOURCES:
        pipe.send(samples)


def member(*arguments: Any) -> None:
    """Be one of the processes."""
    uvloop.run(run_member(*arguments))


def run(repeat: int) -> list[Comparison]:
    """Start the processes and collect what they measured; blocks."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(SOURCES + TARGETS):
        pipe, far = context.Pipe()
        processes.append(context.Process(target=member, args=(rank, far, repeat)))
        processes[-1].start()
        far.close()
        pipes.append(pipe)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(addresses)
    received = [pipe.recv() for pipe in pipes[SOURCES:]]
    for process in processes:
        process.join()
    comparisons = []
    for what, nbytes in received[0]:
        ours, theirs = (
            [max(times) for times in zip(*(samples[what, nbytes][side] for samples in received), strict=True)]
            for side in (0, 1)
        )
        size = f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
        label = f"{what}, {size}, {SOURCES} to {TARGETS}"
        comparisons.append(Comparison(label, ours, "gather, broadcast", theirs, goal(nbytes)))
    return comparisons


async def measure(repeat: int) -> list[Comparison]:
    """Measure every case with every size."""
    return await asyncio.to_thread(run, repeat)
