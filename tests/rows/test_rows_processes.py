"""A row stream between processes, over the links of one host; and the death of one of them."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np

from collective import GroupSpec, PeerLost, RowStream
from collective.formation import form_group
from collective.links import open_endpoint
from collective.types import Credential, Member

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CREDENTIAL = Credential("rows", b"rows rows rows rows rows rows rows")
READERS, TRAINERS = 2, 2
WIDTH = 1 << 16


async def take_part(rank: int, pipe: Connection) -> None:
    """Stream once from beginning to end, then until a reader dies; say what was seen."""
    endpoint = await open_endpoint()
    endpoint.grant(CREDENTIAL)
    pipe.send(endpoint.address)
    addresses = await asyncio.to_thread(pipe.recv)
    members = [
        Member("reader", number, address) if number < READERS else Member("trainer", number - READERS, address)
        for number, address in enumerate(addresses)
    ]
    spec = GroupSpec("feed", ("reader", "trainer"))
    group = await form_group(endpoint, spec, members, rank, key="rows", credential=CREDENTIAL)

    def stream() -> RowStream:
        return RowStream(group, producers="reader", consumers="trainer", batch_size=8, budget=8 << 20)

    first, seen = stream(), []
    if rank < READERS:
        for start in range(0, 160, 40):
            number = np.arange(start, start + 40) * READERS + rank
            await first.put({"n": number, "x": np.broadcast_to(number.astype(np.uint8)[:, None], (40, WIDTH))})
        await first.close()
    else:
        async for batch in first:
            assert (batch["x"] == batch["n"].astype(np.uint8)[:, None]).all()
            seen.append(batch["n"].tolist())
    pipe.send(seen)
    second, count = stream(), 0
    try:
        if rank < READERS:
            while True:
                await second.put({"n": np.arange(8)})
                count += 1
                if rank == 0 and count == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
        else:
            async for _ in second:
                count += 1
    except PeerLost as error:
        pipe.send((error.role, error.rank))
        await asyncio.to_thread(pipe.recv)  # who leaves now is the next one that others lose
    await endpoint.aclose()


def member(rank: int, pipe: Connection) -> None:
    asyncio.run(take_part(rank, pipe))


def test_rows_between_processes_and_the_death_of_one() -> None:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(READERS + TRAINERS):
        pipe, far = context.Pipe()
        processes.append(context.Process(target=member, args=(rank, far), daemon=True))
        processes[-1].start()
        far.close()
        pipes.append(pipe)

    def hear(pipe: Connection) -> Any:
        assert pipe.poll(60)
        return pipe.recv()

    try:
        addresses = [hear(pipe) for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses)
        got = [hear(pipe) for pipe in pipes][READERS:]
        assert [row for step in zip(*got, strict=True) for batch in step for row in batch] == list(range(320))
        assert [hear(pipe) for pipe in pipes[1:]] == [("reader", 0)] * 3
        for pipe in pipes[1:]:
            pipe.send("go")
    finally:
        for process in processes:
            process.kill()
            process.join()
