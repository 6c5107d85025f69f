"""What moving rows from 4 producers to 2 consumers costs: a RowStream against Ray objects and against Redis streams.

Each round every producer gives a block, and each consumer gets half of every block, in one batch. The RowStream also
agrees on the rounds, bounds the memory and mixes the rows; the peers do none of it. Its blocks are given away
(`share`), as those of a reader are that makes a new one each time. With Ray a driver calls the producers
for the halves and hands these on by reference, some rounds ahead. With Redis each producer adds the halves to a stream
for each consumer, in one request a block. All of them are processes of this host; the sides take turns, each
repetition in another order. A sample is seconds a round.
"""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.report import Comparison
from collective import GroupSpec, RowStream
from collective.formation import form_group
from collective.links import open_endpoint
from collective.types import Credential, Member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from collective import Group

REPEAT = 5
PRODUCERS, CONSUMERS = 4, 2
ROW = 1024
ROUNDS = {64 << 10: 500, 1 << 20: 80, 8 << 20: 15}
"""Bytes of a block; rounds in a row."""
GOALS = {
    "Ray objects": {64 << 10: 1 / 10, 1 << 20: 1 / 8, 8 << 20: 1 / 3},
    "Redis streams": {64 << 10: 1 / 2.5, 1 << 20: 1 / 2, 8 << 20: 1 / 1.5},
}
AHEAD = 4
"""Rounds that the driver of the Ray actors is ahead."""
CREDENTIAL = Credential("benchmark", b"benchmark benchmark benchmark benchmark")


def block_of(nbytes: int) -> np.ndarray:
    """Return a producer's block."""
    return np.ones((nbytes // ROW, ROW), np.uint8)


# Gangline and Redis: the same processes


async def stream_rows(group: Group, rank: int, nbytes: int, rounds: int) -> None:
    """Take part in a RowStream."""
    stream = RowStream(
        group, producers="producer", consumers="consumer", batch_size=nbytes // ROW * PRODUCERS // CONSUMERS
    )
    if rank < PRODUCERS:
        block = block_of(nbytes)
        async with stream:
            for _ in range(rounds):
                await stream.put({"row": block}, share=True)
    else:
        got = [len(batch) async for batch in stream]
        assert len(got) == rounds


def use_redis(port: int, rank: int, nbytes: int, rounds: int) -> None:
    """Add to, or read from, one Redis stream for each producer and consumer."""
    import redis

    client = redis.Redis(port=port)
    if rank < PRODUCERS:
        block = block_of(nbytes)
        for _ in range(rounds):
            with client.pipeline(transaction=False) as pipeline:
                for number, half in enumerate(np.split(block, CONSUMERS)):
                    pipeline.xadd(f"{rank}-{number}", {"row": half.reshape(-1).data})
                pipeline.execute()
    else:
        keys = [f"{producer}-{rank - PRODUCERS}".encode() for producer in range(PRODUCERS)]
        last: dict[Any, Any] = dict.fromkeys(keys, "0")
        waiting: dict[bytes, deque[bytes]] = {key: deque() for key in keys}
        for _ in range(rounds):
            while not all(waiting.values()):
                for key, entries in client.xread(last, count=16, block=0):
                    last[key] = entries[-1][0]
                    waiting[key].extend(entry[b"row"] for _, entry in entries)
            halves = [np.frombuffer(waiting[key].popleft(), np.uint8) for key in keys]
            batch = np.concatenate(halves).reshape(-1, ROW)
            assert len(batch) == nbytes // ROW * PRODUCERS // CONSUMERS
        client.unlink(*keys)
    client.close()


async def run_member(rank: int, port: int, pipe: Connection) -> None:
    """Be a producer or consumer: do what the pipe says until it says None."""
    endpoint = await open_endpoint(kinds=("shm", "unix"))
    endpoint.grant(CREDENTIAL)
    pipe.send(endpoint.address)
    members = [
        Member("producer", number, address) if number < PRODUCERS else Member("consumer", number - PRODUCERS, address)
        for number, address in enumerate(await asyncio.to_thread(pipe.recv))
    ]
    spec = GroupSpec("group", ("producer", "consumer"), backend="shm")
    group = await form_group(endpoint, spec, members, rank, key="benchmark", credential=CREDENTIAL)
    pipe.send("ready")
    while (job := await asyncio.to_thread(pipe.recv)) is not None:
        side, nbytes, rounds = job
        if side == "gangline":
            await stream_rows(group, rank, nbytes, rounds)
        else:
            await asyncio.to_thread(use_redis, port, rank, nbytes, rounds)
        pipe.send("done")
    await group.aclose()
    await endpoint.aclose()


def member(*arguments: Any) -> None:
    """Be one of the processes."""
    uvloop.run(run_member(*arguments))


@contextmanager
def members(port: int) -> Iterator[Callable[[str, int, int], None]]:
    """Start the processes; what it gives has them all do a job."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(PRODUCERS + CONSUMERS):
        pipe, far = context.Pipe()
        processes.append(context.Process(target=member, args=(rank, port, far), daemon=True))
        processes[-1].start()
        far.close()
        pipes.append(pipe)
    addresses = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send(addresses)
    for pipe in pipes:
        pipe.recv()

    def do(side: str, nbytes: int, rounds: int) -> None:
        for pipe in pipes:
            pipe.send((side, nbytes, rounds))
        for pipe in pipes:
            pipe.recv()

    try:
        yield do
    finally:
        for pipe in pipes:
            with suppress(BrokenPipeError):  # one that failed has said so
                pipe.send(None)
        for process in processes:
            process.join(10)


@contextmanager
def redis_server() -> Iterator[int]:
    """Run a Redis server on a free port of loopback that writes nothing to disk; 0 where there is none."""
    missing = [name for name, there in (
        ("redis-server", shutil.which("redis-server")),
        ("the Python package redis", importlib.util.find_spec("redis")),
    ) if not there]  # fmt: skip
    if missing:
        print(f"not compared with Redis streams: {' and '.join(missing)} missing", file=sys.stderr)
        yield 0
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        server = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)
        try:
            while server.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield port
        finally:
            server.terminate()
            server.wait()


# Ray


@contextmanager
def ray_actors() -> Iterator[Callable[[int, int], None]]:
    """Start Ray and its actors; what it gives moves blocks of some bytes for some rounds."""
    import ray

    @ray.remote(num_cpus=0)
    class Producer:
        def prepare(self, nbytes: int) -> None:
            self.block = block_of(nbytes)

        @ray.method(num_returns=CONSUMERS)
        def halves(self) -> list[np.ndarray]:
            return np.split(self.block, CONSUMERS)

    @ray.remote(num_cpus=0)
    class Consumer:
        def take(self, *halves: np.ndarray) -> int:
            return len(np.concatenate(halves))

    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=1 << 30,
    )  # fmt: skip
    try:
        producers = [Producer.remote() for _ in range(PRODUCERS)]
        consumers = [Consumer.remote() for _ in range(CONSUMERS)]

        def move(nbytes: int, rounds: int) -> None:
            ray.get([producer.prepare.remote(nbytes) for producer in producers])
            taken: deque[list[Any]] = deque()
            for _ in range(rounds):
                halves = [producer.halves.remote() for producer in producers]
                shares = zip(*halves, strict=True)
                taken.append([consumer.take.remote(*own) for consumer, own in zip(consumers, shares, strict=True)])
                del halves, shares
                if len(taken) > AHEAD:
                    ray.get(taken.popleft())
            while taken:
                ray.get(taken.popleft())

        yield move
    finally:
        ray.shutdown()


def run(repeat: int) -> list[Comparison]:
    """Measure; blocks."""
    samples: dict[tuple[str, int], list[float]] = {}
    with redis_server() as port, members(port) as do, ray_actors() as move:
        sides: dict[str, Callable[[int, int], None]] = {
            "gangline": lambda nbytes, rounds: do("gangline", nbytes, rounds),
            "Ray objects": move,
        }
        if port:
            sides["Redis streams"] = lambda nbytes, rounds: do("redis", nbytes, rounds)
        for nbytes, rounds in ROUNDS.items():
            for number in range(-1, repeat):  # the first time warms up
                names = list(sides)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    start = time.perf_counter()
                    sides[name](nbytes, rounds)
                    if number >= 0:
                        seconds = (time.perf_counter() - start) / rounds
                        samples.setdefault((name, nbytes), []).append(seconds)
    return [
        Comparison(
            f"{PRODUCERS} to {CONSUMERS}, {nbytes >> 10} KiB a block" if nbytes < 1 << 20
            else f"{PRODUCERS} to {CONSUMERS}, {nbytes >> 20} MiB a block",
            samples["gangline", nbytes], peer, samples[peer, nbytes], goal[nbytes],
        )
        for peer, goal in GOALS.items()
        if peer in sides
        for nbytes in ROUNDS
    ]  # fmt: skip


async def measure(repeat: int) -> list[Comparison]:
    """Measure every size."""
    return await asyncio.to_thread(run, repeat)
