"""What collectives between processes of one host cost: a group on "shm" against torch's Gloo, used directly.

Each process is a member of both, and all have their inputs and outputs ready: `out=` here, tensors to write to there.
The sides take turns, each round in another order; a sample is one operation on rank 0, in a row of several.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import uvloop
from torch import distributed

from benchmarks.report import Comparison
from collective import GroupSpec
from collective.formation import form_group
from collective.links import open_endpoint
from collective.types import Credential, Member

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from multiprocessing.connection import Connection

    from collective import Group
    from collective.types import Address

REPEAT = 7
RANKS = (2, 4)
ROWS = {8: 100, 1 << 20: 20, 16 << 20: 3, 64 << 20: 1}
"""Bytes that each rank gives to an allreduce or allgather, or gets from a reduce_scatter; operations in a row."""
OPERATIONS = ("allreduce", "allgather", "reduce_scatter")
CREDENTIAL = Credential("benchmark", b"benchmark benchmark benchmark benchmark")


def goal(operation: str, nbytes: int, ranks: int) -> float:
    """Return what the ratio to Gloo may be."""
    if nbytes == 8:
        return 1 / 10 if operation == "allreduce" else 1 / 4
    return 1 / 5 if ranks == 2 else 1 / 3


def name(nbytes: int) -> str:
    """Return a size for people."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes} B"


def sides(group: Group, operation: str, nbytes: int) -> tuple[Callable[[], Awaitable[Any]], Callable[[], object]]:
    """Return an operation of both, with arrays of its own for each."""
    length, size = nbytes // 4, group.size
    sizes = {"allreduce": (1, 1), "allgather": (1, size), "reduce_scatter": (size, 1)}[operation]
    source, out = (np.ones(length * times, np.float32) for times in sizes)
    given, got = (torch.ones(length * times) for times in sizes)
    issue = getattr(group, operation)
    direct: dict[str, Callable[[], object]] = {
        "allreduce": lambda: distributed.all_reduce(got.copy_(given)),  # it works in place, and the input stays here
        "allgather": lambda: distributed.all_gather_into_tensor(got, given),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(got, given),
    }
    return lambda: issue(source, out=out), direct[operation]


async def run_member(rank: int, size: int, store: str, pipe: Connection, repeat: int) -> None:
    """Measure as one member; rank 0 sends the samples of both sides by operation and size."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # newer torch has other names for the same, older has not
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    endpoint = await open_endpoint()
    endpoint.grant(CREDENTIAL)
    pipe.send(endpoint.address)
    addresses: list[Address] = await asyncio.to_thread(pipe.recv)
    members = [Member("member", rank, address) for rank, address in enumerate(addresses)]
    spec = GroupSpec("group", ("member",), backend="shm")
    group = await form_group(endpoint, spec, members, rank, key="benchmark", credential=CREDENTIAL)
    samples: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for nbytes, row in ROWS.items():
        for operation in OPERATIONS:
            ours, theirs = samples[operation, nbytes] = [], []
            here, there = sides(group, operation, nbytes)
            await here()
            there()
            for number in range(repeat):
                for side in (0, 1) if number % 2 else (1, 0):
                    distributed.barrier()
                    await group.barrier()
                    for _ in range(row):
                        start = time.perf_counter()
                        if side == 0:
                            await here()
                        else:
                            there()
                        (ours, theirs)[side].append(time.perf_counter() - start)
    distributed.destroy_process_group()
    await group.aclose()
    await endpoint.aclose()
    if rank == 0:
        pipe.send(samples)


def member(*arguments: Any) -> None:
    """Be one of the processes."""
    uvloop.run(run_member(*arguments))


def run(size: int, repeat: int) -> list[Comparison]:
    """Start the processes and collect what they measured; blocks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes = []
        processes = []
        for rank in range(size):
            pipe, far = context.Pipe()
            arguments = (rank, size, os.path.join(directory, "store"), far, repeat)
            processes.append(context.Process(target=member, args=arguments))
            processes[-1].start()
            far.close()
            pipes.append(pipe)
        addresses = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses)
        samples = pipes[0].recv()
        for process in processes:
            process.join()
    return [
        Comparison(
            f"{operation}, {name(nbytes)}, {size} ranks", ours, "torch Gloo", theirs, goal(operation, nbytes, size)
        )
        for (operation, nbytes), (ours, theirs) in samples.items()
    ]


async def measure(repeat: int) -> list[Comparison]:
    """Measure with each number of ranks."""
    return [each for size in RANKS for each in await asyncio.to_thread(run, size, repeat)]
